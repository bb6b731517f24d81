"""Residual connections that are more than a sum: several streams, and a learnt part of the stream."""
