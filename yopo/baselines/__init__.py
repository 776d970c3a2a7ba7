"""Other ways to spend a visual budget, on the same model object: what a plan has to beat.

Small re-implementations from the papers' descriptions, none of them the authors' code. A method is
one class in one file (``baseline.py`` says what such a class decides) and one line in
``registry.py``; decoder, cache, forward and installation know no method's name.
"""
