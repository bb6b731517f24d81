"""The training run: state, optimizer, step, loop, and what it tells."""
