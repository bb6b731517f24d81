"""One file per model family, found by its `MODEL_TYPES`."""
