"""Figures: tables and records in, files out. One shared style, units on every axis."""
