"""The machine that a program runs on: its devices, its memory, its processes and the signals they get."""
