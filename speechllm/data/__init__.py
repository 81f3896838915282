"""Shards, their index, the plan of an epoch, and everything between a tar and a batch."""
