"""Formulas against what torch counts."""
