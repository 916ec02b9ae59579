"""Settings: their schema, the methods as data, and presets from file to frozen configuration."""
