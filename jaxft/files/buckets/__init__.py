"""Folders in buckets of Google Cloud Storage: their objects, who writes there, and the working copy of a run."""
