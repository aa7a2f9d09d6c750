"""graph: a model as an ONNX graph with the stock interface, padding removed inside or rows of fixed shape."""
