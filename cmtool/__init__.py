"""cmtool: train, distil, sample, edit and judge consistency models."""

__version__ = "0.1.0"
