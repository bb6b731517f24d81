"""Tuned models of a comparison: runs that it trains itself, what more rows would give, and what a model forgot."""
