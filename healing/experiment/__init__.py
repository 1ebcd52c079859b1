"""The stages, put together: load, run, measure, store."""
