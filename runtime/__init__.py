"""The NumPy runtime: prompt text, noise, schedulers, pipeline and video files."""
