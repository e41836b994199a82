"""Fault drills and bitwise comparisons that users can run on their own training, too."""

from __future__ import annotations
