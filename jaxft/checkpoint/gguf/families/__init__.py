"""The tables of the families, by kind."""
