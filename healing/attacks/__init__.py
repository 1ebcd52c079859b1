"""The attack loop, the catalyst search, damage matching."""
