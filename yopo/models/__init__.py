"""What a model *is*, as data: one file per family, one line in the registry."""
