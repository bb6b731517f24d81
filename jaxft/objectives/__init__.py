"""Training objectives: each a `Loss = (model, batch, key) -> LossSums`."""
