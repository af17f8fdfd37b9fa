"""From torch modules to ONNX graphs; the only package that imports torch."""
