"""Readers of data sets in many formats: each yields records (name, undecoded image, label) in a fixed order."""
