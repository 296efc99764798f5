"""What the engine is measured against: a FastAPI route that runs the same session on the same body, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from fastapi import FastAPI, Request, Response

from family.manifest import load_manifest
from service.runtime import Runtime


def create_app() -> FastAPI:
    """For `uvicorn --factory`; the bundle is named by the variable `BUNDLE`."""
    bundle = Path(os.environ["BUNDLE"])
    manifest = load_manifest(bundle)
    runtime = Runtime(bundle, manifest, threads=1, device="cpu")
    path, shape, labels = manifest.front[0], manifest.input.shape[1:], manifest.labels
    temperature = np.float32(manifest.offered[path].temperature)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        x = np.frombuffer(await request.body(), "<f4").reshape(-1, *shape)
        logits = runtime.run(path, x, embed=True).logits
        assert logits is not None
        scaled = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
        probabilities = scaled / scaled.sum(axis=1, keepdims=True)
        predictions = [
            {"label": labels[int(row.argmax())], "confidence": float(row.max()), "depth": len(path)}
            for row in probabilities
        ]
        return Response(json.dumps({"predictions": predictions}), media_type="application/json")

    return app
