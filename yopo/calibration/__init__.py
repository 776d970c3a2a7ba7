"""Measures on image-question pairs which parts of a model visual tokens use."""
