"""ONNX artifacts: a checkpoint becomes a directory that runs in ONNX Runtime alone, fed with packed sequences."""
