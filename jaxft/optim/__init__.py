"""Optimizers, their states and learning rates."""
