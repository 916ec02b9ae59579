"""Settings: their schema, the methods as data, and the way from a preset file to a frozen configuration."""
