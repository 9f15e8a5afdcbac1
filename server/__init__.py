"""The OpenAI-compatible server: vLLM's own, started through its Python entry points."""
