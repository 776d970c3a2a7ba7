"""Image-question pairs: sources, reading rows, and building prompts."""
