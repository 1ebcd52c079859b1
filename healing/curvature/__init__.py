"""Linear algebra on flat vectors: Hessian products, Lanczos, subspaces, the loss landscape."""
