"""Inference runtime for small text-to-video diffusion models."""
