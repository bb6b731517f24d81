"""What a run's step needs of its devices' memory, by arithmetic, and what is recomputed for its sake."""
