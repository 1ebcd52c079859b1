"""Peak memory of attack and healing, predicted with nothing loaded."""
