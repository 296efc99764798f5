"""The server: HTTP -> engine (admission, queue, policy) -> runtime, and back. Runs without torch and onnx."""
