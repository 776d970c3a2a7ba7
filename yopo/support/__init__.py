"""Shared foundations: errors, console, files, strict YAML. No torch."""
