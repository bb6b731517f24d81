"""What answers in a comparison: models on this machine, endpoints elsewhere, and the answers that are kept."""
