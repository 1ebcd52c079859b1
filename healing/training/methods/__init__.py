"""Healing methods, one file each: what is trained, and how it is put in and taken out."""
