"""Inputs that each layer has of its own, from a second embedding table."""
