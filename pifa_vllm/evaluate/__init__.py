"""Perplexity of a checkpoint, by transformers and by vLLM."""
