"""Fewer visual tokens before the decoder: methods that choose, and merge, an image's tokens."""
