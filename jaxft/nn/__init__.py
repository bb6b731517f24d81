"""Layers, which are independent of the model family."""
