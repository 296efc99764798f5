"""The services of the port, by the names that clients call them."""

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
