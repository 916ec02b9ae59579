"""Readers of other people's data: each yields records (name, label, undecoded image) in a fixed order."""
