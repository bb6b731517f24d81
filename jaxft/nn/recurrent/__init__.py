"""Layers that carry a state from position to position, and the short convolutions before them."""
