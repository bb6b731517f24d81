"""The training run: state, optimizer, step, loop and log."""
