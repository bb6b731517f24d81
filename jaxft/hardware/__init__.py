"""A training step compiled for accelerators that are not there: its memory, its time and its price."""
