"""Baidu's ERNIE."""
