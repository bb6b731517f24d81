"""What clients ask for in chat/completions and completions, checked field by field, and the objects that they get."""
