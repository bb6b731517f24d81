"""Whole runs: from a config to a folder with checkpoints, exports, scores and a report."""
