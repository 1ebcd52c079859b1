"""Ways of hurting a model, and the one driver that all of them go through."""
