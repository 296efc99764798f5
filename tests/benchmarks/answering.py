"""A small server for the load client, run as a process of its own: `python -m tests.benchmarks.answering FD`, where FD
is a socket that listens already."""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

app = FastAPI()


@app.post("/echo")
async def echo(request: Request) -> Response:
    content = {"content-type": request.headers["content-type"]} if "content-type" in request.headers else {}
    return Response(await request.body(), headers=content)


@app.post("/status/{code}")
async def status(code: int, request: Request) -> Response:
    return Response(await request.body(), status_code=code)


@app.post("/close")
async def close(request: Request) -> Response:
    return Response(await request.body(), headers={"Connection": "close"})


@app.post("/chunks")
async def chunks(request: Request) -> Response:
    body = await request.body()

    async def pieces():
        for byte in body:
            yield bytes([byte])

    return StreamingResponse(pieces())


@app.post("/never")
async def never() -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=0)
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[1]))])
