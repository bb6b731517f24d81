"""Optimizers as optax transformations, their states, and learning rates."""
