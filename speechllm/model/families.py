"""Which kinds of LLM the shortcuts know."""

# By transformers' `model_type`. Tests build each and compare: its logits are the output matrix
# times the last hidden state and nothing else, and grouped attention can stand in for its own.
# Of other kinds neither is taken for granted: Gemma 2 caps logits, Cohere and Granite scale them.
KNOWN = frozenset(
    {
        "gemma", "gpt_neox", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3",
        "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip
