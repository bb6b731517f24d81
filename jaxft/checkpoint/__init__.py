"""Reading and writing weights: Hugging Face folders, GGUF, PEFT, and resumable checkpoints."""
