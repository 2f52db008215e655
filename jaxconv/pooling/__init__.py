"""Pooling: windows that slide, with a maximum, a minimum or a sum in place of a product."""
