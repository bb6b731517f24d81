"""Which run a folder holds, and whether another one is the same: its mark, what it reads, what may change."""
