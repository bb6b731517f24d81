"""Mistral AI's models."""
