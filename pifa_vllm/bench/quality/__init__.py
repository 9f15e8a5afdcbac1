"""What compression costs, and what it costs the model: perplexity by method and density."""
