"""Files wherever they are: paths and addresses, GGUF headers, atomic writes, the names in a run folder."""
