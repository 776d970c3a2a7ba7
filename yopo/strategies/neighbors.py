"""Neighbor-aware attention: how far a visual token needs to see."""

from __future__ import annotations

PAPER_RADIUS = 2
"""The authors' 5 x 5 window."""
