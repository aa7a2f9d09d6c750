"""mixture: how a mixture of experts runs in ONNX, which form is chosen, and parity that follows its choices."""
