"""Convolutions in programs for several devices: how they are cut, and what devices exchange."""
