"""Front-end, encoder, connector and LLM, put together as one module."""
