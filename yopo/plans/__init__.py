"""The pruning plan: schema, files, tensors, and closed-form costs."""
