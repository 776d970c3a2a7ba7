"""Least-squares fits for visual tokens: profiles, fitted weights, the layerwise walk."""
