"""Liquid AI's LFM2."""
