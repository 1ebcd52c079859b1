"""Command-line entry points, one per MLproject entry point."""
