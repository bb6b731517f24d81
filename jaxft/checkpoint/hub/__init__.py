"""The Hugging Face Hub: the name and the license of a base model, model cards, and pushing a folder."""
