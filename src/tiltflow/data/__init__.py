"""Prompts, their embeddings, and the cache of those."""
