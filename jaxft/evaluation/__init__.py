"""Evaluation on held-out rows: loss, perplexity, and scores of generated answers."""
