"""Attention over whole rows on each kind of device: its kernels, and blocks of plain XLA."""
