"""Tests, as a package of their own: another project may have installed a top-level `tests`."""
