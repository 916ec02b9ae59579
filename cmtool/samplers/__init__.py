"""Walking a model: pure functions of (model, noise streams, times, label).

Nothing here reads files, prints, or draws from a global generator; the noise of sample i comes from its own stream,
so batch size and order change nothing. Times are noise levels in the units of `sigma_max`, strictly decreasing.
"""
