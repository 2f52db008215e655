"""Benchmarks: what jaxconv is measured by. ``jaxconv bench`` runs them."""
