"""Tokenizers from Hugging Face folders, SentencePiece models and GGUF files."""
