"""The only place that knows MLflow; files of a run."""
