"""From a checkpoint in diffusers layout to ONNX graphs and their weights."""
