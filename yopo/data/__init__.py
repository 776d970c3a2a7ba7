"""Image-question pairs: where they come from, how rows are read, and prompts made of them."""
