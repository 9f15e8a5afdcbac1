"""Models served by vLLM: against the dense model, against bare vLLM, and as drafts."""
