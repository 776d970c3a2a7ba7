"""Pruning strategies: one file each, ``score`` then ``select``, pure tensor math."""
