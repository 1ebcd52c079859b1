"""Measurements on request: one file each, its first line what ``--help`` says."""
