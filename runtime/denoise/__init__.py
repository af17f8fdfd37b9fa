"""One denoising step."""
