"""Judging samples: features, their statistics, and the figures that papers report."""
