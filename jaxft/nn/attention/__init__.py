"""Attention: the layer, its kernels, rotary positions and the KV cache."""
