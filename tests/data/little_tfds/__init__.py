"""A TFDS builder in a package of its own, where TFDS looks for its metadata."""
