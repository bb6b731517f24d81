"""One file per model family, found by its `MODEL_TYPES`; those of one maker are in a folder."""
