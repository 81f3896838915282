"""One small protocol for how the ranks share the work of a step."""
