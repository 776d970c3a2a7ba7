"""Code that made the demo models: untrained models, training rows, recipes, training loop."""
