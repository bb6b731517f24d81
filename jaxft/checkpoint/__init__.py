"""Weights in and out: Hugging Face folders, GGUF, PEFT, and resumable checkpoints."""
