"""Reading weights that other tools quantised, and quantising while loading."""
