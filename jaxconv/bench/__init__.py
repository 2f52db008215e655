"""Benchmarks of jaxconv. ``jaxconv bench`` runs them."""
