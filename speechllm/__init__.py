"""Train speech LLMs: a frozen Whisper encoder, a trainable connector, a frozen causal LLM."""

__version__ = "0.1.0"
