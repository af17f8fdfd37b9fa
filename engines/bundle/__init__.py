"""Bundles: what is in one, and one on disk."""
