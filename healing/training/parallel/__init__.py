"""One model over several processes: how they start and end, and what each does."""
