"""Benchmarks: what jaxconv is measured by. ``python -m jaxconv.bench`` runs them."""
