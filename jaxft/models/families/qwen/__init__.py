"""Alibaba's Qwen."""
