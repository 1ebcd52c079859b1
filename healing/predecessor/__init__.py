"""NeuroEntropy's recorded results: read, import, summarize. Nothing else needs this package."""
