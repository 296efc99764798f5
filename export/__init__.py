"""Export: a trained family -> one ONNX graph per fast path, the gated graph of all of them, and their manifest."""
