"""The Open Inference Protocol over gRPC: `inference.GRPCInferenceService`, on a port of its own beside HTTP, in the same
process, event loop and engine. Needs the extra `grpc`; only modules in here know that library.

    port.py        whether gRPC is wanted and can be had
    server.py      the port: limits, start, drain
    access.py      request ids and the access log
    callers.py     who may call
    names.py       the services' names
    service.py     the RPCs
    answering.py   requests for answers: to the engine and back
    gate.py        where they wait in a crowd
    streams.py     the RPC that is a stream of them
    messages.py    messages  <->  what `service.oip` reads and tells
    status.py      errors as status and trailing metadata
    generate.py    stubs/ from the proto

What a request means and what is answered is `service.oip`'s: the same as over REST.
"""
