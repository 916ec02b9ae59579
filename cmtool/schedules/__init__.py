"""Scheduled numbers: curricula, draws of noise levels, learning rates. Pure functions of step, share or seed."""
