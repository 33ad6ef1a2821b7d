"""Serves an exported posterior over HTTP; imports JAX, NumPy and Starlette, and no more.

    python server.py FOLDER [--host 127.0.0.1] [--port 8000]

``GET /manifest`` says what there is. ``POST /encode``, ``/sample``, ``/importance`` and
``/novelty`` take ``{"inputs": {"x": [[...], ...]}, "seed": 0, "allow_novel": false}`` and answer as
the program of this name does, with the ``novelty`` of each row. A row's draws depend on the seed,
on its number in the request, and on nothing else. What is wrong with a request is said with a
status of 4xx:

* 400, it is no JSON, or has other fields;
* 404, there is no such program;
* 413, it has too many rows, or bytes;
* 422, arrays have another shape than the programs take, values that are not finite, or rows that
  are unlike those that the guide was trained on, which ``allow_novel`` lets pass.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import uvicorn
from batching import Batcher
from parsing import parse
from served import Served
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MAX_BYTES = 2**24  # of a request


async def read_body(request: Request) -> bytes:
    """Return the body of a request, of which no more is read than it may have."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the request has more than {MAX_BYTES} bytes")
    return bytes(body)


def render(name: str, found: dict[str, Any]) -> bytes:
    """Return an answer as JSON, in which null stands for what is not finite."""

    def plain(array: np.ndarray) -> list:
        finite = np.isfinite(array)
        if finite.all():
            return array.tolist()
        values = array.astype(object)
        values[~finite] = None
        return values.tolist()

    answer = jax.tree.map(plain, found[name] if name == "novelty" else {name: found[name]})
    if name != "novelty" and "novelty" in found:
        answer["novelty"] = plain(found["novelty"]["novelty"])
    return json.dumps(answer).encode()


def novel_rows(served: Served, found: dict[str, Any]) -> np.ndarray:
    """Return the numbers of the rows that the guide was not trained for."""
    if "novelty" not in found:
        return np.empty(0, int)
    return np.flatnonzero(found["novelty"]["novelty"] <= served.manifest["novelty"]["level"])


def make_app(served: Served) -> Starlette:
    """Return the application."""
    batcher = Batcher(served)

    async def manifest(request: Request) -> Response:
        return JSONResponse(served.manifest)

    async def run(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in served.programs:
            raise HTTPException(404, f"there is no {name}, only {list(served.programs)}")
        body = await read_body(request)
        asked = await asyncio.to_thread(parse, served, body)
        found = await batcher.ask(name, asked)
        novel = novel_rows(served, found)
        if novel.size and name != "novelty" and not asked.allow_novel:
            text = f"rows {novel.tolist()} are unlike those that the guide was trained on"
            return JSONResponse({"error": text, "rows": novel.tolist()}, 422)
        return Response(await asyncio.to_thread(render, name, found), media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return JSONResponse({"error": getattr(error, "detail", str(error))}, status)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        served.warm_up()
        task = asyncio.create_task(batcher.serve())
        yield
        task.cancel()

    routes = [
        Route("/manifest", manifest),
        Route("/{name}", run, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refuse})


def main() -> None:
    """Load a folder, and serve it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what Posterior.export wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    served = Served(args.folder)
    print(f"serving {', '.join(served.programs)} at http://{args.host}:{args.port}", flush=True)
    uvicorn.run(make_app(served), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
