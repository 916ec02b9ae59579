"""Pages about runs: what a run folder says, drawn and written as one HTML file."""
