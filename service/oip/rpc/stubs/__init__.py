"""The published interface, as far as it is served, and what `service.oip.rpc.generate` makes of it."""
