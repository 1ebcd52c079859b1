"""Many runs: intervals, tests, survival, fits, power, groups. No torch, not even indirectly."""
