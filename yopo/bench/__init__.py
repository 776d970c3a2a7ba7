"""Does time follow the FLOPs? Dense against pruned on real or random weights."""
