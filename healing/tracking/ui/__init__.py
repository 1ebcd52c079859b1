"""What this project puts into MLflow's own UI: links, views of the runs, the experiment's page."""
