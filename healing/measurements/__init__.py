"""What is measured on one state of a model, and what is said of one run."""
