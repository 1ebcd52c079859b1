"""Pure cells: a frozen configuration in, records and an outcome out; no files, no MLflow."""
