"""Other ways to spend a visual budget, on the same model object: what a plan has to beat.

Small re-implementations from the papers' descriptions, none of them the authors' code: visual
token withdrawal (VTW, arXiv 2405.05803), FastV (arXiv 2403.06764), plain downsampling of the image
features (the baseline of arXiv 2510.07143), and the masks by which arXiv 2410.06169 is simulated.
"""
