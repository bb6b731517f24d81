"""Encoded sets: rows are tokenised in parts, by several processes, and kept as columns in Arrow files on disk."""
