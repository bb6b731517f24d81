"""Sources of tensors that are made of the tensors of another source."""
