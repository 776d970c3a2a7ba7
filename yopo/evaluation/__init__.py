"""Dense against pruned: fidelity, accuracy and time, measured on the same pairs in one process."""
