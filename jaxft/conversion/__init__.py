"""`jaxft convert`: between Hugging Face, GGUF and Orbax folders, a tensor at a time."""
