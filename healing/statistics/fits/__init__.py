"""Regressions on recoveries: laws of approach, their limits, and recovery against size."""
