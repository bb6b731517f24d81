"""`jaxft plan`: the training step of a run on accelerators that are not here, compiled and costed."""
