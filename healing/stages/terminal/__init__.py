"""What a person sees while a stage runs, and how long each of its phases took."""
