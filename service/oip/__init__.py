"""The Open Inference Protocol v2 over REST, beside `/v1`, on the same engine.

Sources: the protocol, github.com/kserve/open-inference-protocol; its extensions for binary tensors, model configuration
and statistics, github.com/triton-inference-server/server, docs/protocol. Only what is served is announced.

    wire.py        body  <->  JSON header and binary tensors
    tensors.py     tensors  <->  rows of the model and its answers
    infer.py       the route that answers
    routes.py      the routes that tell: metadata, health, configuration, statistics, index
    statistics.py  the server's metrics as the statistics extension has them
    schemas.py     the bodies
"""
