"""Training objectives: pure functions `(model, batch, key, method_state) -> LossSums`, and what they are built from."""
