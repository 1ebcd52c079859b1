"""Causal language models: load, identify, take apart, save and restore; token losses."""
