"""Measurements of speed and quality: `python -m benchmarks train-step|sample|averages|eval|data ...`."""
