"""Contrasts of arms, planned beforehand: which, by which rule, and what they say."""
