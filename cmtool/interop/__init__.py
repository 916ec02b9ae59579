"""Other people's weights to ours and back: readers and writers, known names, downloads."""
