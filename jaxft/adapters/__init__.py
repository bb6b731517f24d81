"""Adapters: small trainable additions to a frozen model, each kind in a module of its name."""
