"""DeepSeek's models, and those of their kind."""
