"""Configuration: the schema and its loading; imports no torch."""
