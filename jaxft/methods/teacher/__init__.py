"""The frozen teacher of a run, and its log-probabilities computed before the first step."""
