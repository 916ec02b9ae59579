"""Sampling: pure functions of a model, noise and noise levels.

Nothing here reads files, prints, or draws from a global generator. The noise of sample i comes from its own stream, so
batch size and order change nothing. Times are noise levels in the units of `sigma_max`, strictly decreasing.
"""
