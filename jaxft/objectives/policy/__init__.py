"""Losses of methods that learn from rewards: the policy's, and what its answers are credited with."""
