"""Where work is actually skipped: the pruned decoder, its cache, and the masked specification."""
