"""Layers that know no model family."""
