"""A plan for people and machines: rich tables, a heat map, a profile and JSON. Imports no torch."""
