"""Prompt texts to prompt embeddings."""
