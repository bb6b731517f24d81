"""Mixture-of-experts layers: routing, expert products, experts over several devices."""
