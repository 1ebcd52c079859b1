"""Steps of a model: optimisers, number formats, the healing loop, pretraining."""
