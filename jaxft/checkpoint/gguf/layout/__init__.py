"""How the tensors of a file are made of those of Hugging Face's files."""
