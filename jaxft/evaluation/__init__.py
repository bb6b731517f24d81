"""How good a model is on rows it was not trained on: loss, perplexity, and scores by generation."""
