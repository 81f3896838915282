"""What users meet when their input is wrong: every message says what, where, and the mend."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong. The message says what, where, and how to mend it."""

    exit_code = 2  # of the process


class LostLease(UserError):
    """Another process has taken over the run directory; see `speechllm.lease`."""

    exit_code = 98


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A shard, an index, a manifest or a member is wrong."""


class AudioError(DataError):
    """One utterance's audio cannot be used (undecodable, empty, not finite)."""


class ModelError(UserError):
    """A model directory or hub id cannot be used."""


class CheckpointError(UserError):
    """A checkpoint does not fit the run that wants it."""
