"""Batch systems: one command takes a configuration to many hosts. Imports no torch."""
