"""Least squares for what visual tokens compute: profiles, fitted weights, the layerwise walk."""
