"""Renders plans as rich tables, a heat map, a profile and JSON. Imports no torch."""
