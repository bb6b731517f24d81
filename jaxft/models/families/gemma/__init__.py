"""Google's Gemma."""
