"""The studio: a local page that paints, edits and interpolates with one model. Standard library and the API alone."""
