"""Other ways to spend a visual budget, on the same model object: what a plan has to beat.

Small re-implementations from the papers' descriptions, not the authors' code. A method is one class
in one file (``baseline.py`` defines its interface) and one line in ``registry.py``; decoder, cache,
forward and installation are independent of the method.
"""
