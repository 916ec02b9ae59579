"""The command line: one module for each command, light at the top."""
