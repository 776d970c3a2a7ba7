"""How the work is really skipped: the pruned decoder, its cache, and the masked specification."""
