"""How the demo models were made: untrained models, training rows, recipes, the training loop."""
