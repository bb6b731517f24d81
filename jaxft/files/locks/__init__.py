"""Locks: one writer of a folder or file at a time."""
