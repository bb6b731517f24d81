"""From a conversation to token ids and the mask of trained tokens."""
