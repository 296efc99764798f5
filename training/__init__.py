"""Training of families: data -> model -> objective -> trainer -> checkpoint, and the evaluation of every path."""
