"""Measures, on image-question pairs, what visual tokens really use of a model."""
