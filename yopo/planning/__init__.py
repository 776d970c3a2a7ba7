"""From statistics and a request to a plan: the paper's shape, or the best plan at a budget."""
