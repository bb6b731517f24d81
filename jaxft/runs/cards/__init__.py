"""What a run tells of itself: the command that repeats it, and the model cards of its exports."""
