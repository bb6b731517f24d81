"""Quantised weights of other tools, and quantisation while loading."""
