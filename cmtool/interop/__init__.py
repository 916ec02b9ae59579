"""Weights of other code bases: readers, writers, and the published models known by name."""
