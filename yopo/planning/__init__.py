"""From statistics and wishes to a plan: presets, explicit knobs, or the best shape at a budget."""
