"""The pruning plan: its schema, its files, its tensors, and what it costs in closed form."""
