"""What is there: the state of the runs below a folder, and whether what was written is whole. Nothing is written."""
