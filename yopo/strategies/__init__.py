"""What may be pruned: one file per strategy, ``score`` then ``select``, pure tensor math."""
