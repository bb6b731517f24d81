"""Adapters: small trainable additions to a frozen model. Each kind is in the module of its name."""
