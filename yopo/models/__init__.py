"""Model families described as data: one file per family, one line in the registry."""
