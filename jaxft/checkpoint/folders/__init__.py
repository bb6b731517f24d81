"""Opening of model folders: whatever names and kinds of tensors they have, as the tensors of one of our models."""
