"""The chains of a sweep, run here in threads or on a cluster by Ray."""
