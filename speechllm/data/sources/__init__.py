"""Corpora of many kinds as streams of one kind of utterance."""
