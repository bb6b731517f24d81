"""The steps of a run in its checkpoint folder: their names, what is in one, and whether it can be read."""
