"""Hypothetical accelerators: chips, topologies and prices; a step compiled for them, its costs and its time."""
