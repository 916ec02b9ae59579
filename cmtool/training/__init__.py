"""The training loop and what it keeps: it yields reports and calls back, and never prints."""
