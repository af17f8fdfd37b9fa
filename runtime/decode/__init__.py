"""Latents to frames."""
