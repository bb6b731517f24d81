"""Answers that the model samples while it trains, and the rewards that they are given."""
