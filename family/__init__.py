"""The shared kernel: the path algebra of the tree and the schema of a bundle.

`training`, `export` and `service` talk through files and through the plain data defined here. Nothing in this
package knows torch, onnx, onnxruntime or HTTP.
"""
