"""`jaxft plan`: memory, time and price of a run on accelerators that this machine does not have.

The training step of the config is compiled ahead of time for TPUs, or estimated by arithmetic for GPUs; a search tries
slices, meshes, micro-batches and rematerialisation policies.
"""
