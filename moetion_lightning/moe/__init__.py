"""Mixtures of experts: what they do while they train."""
