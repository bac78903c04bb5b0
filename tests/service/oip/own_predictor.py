"""A predictor of our own: a server of the Open Inference Protocol that tells what it was sent."""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.service.manifests import SIDE

TYPES = {"FP32": "<f4", "UINT8": "u1"}
LENGTH = "Inference-Header-Content-Length"


@dataclass
class OwnPredictor:
    """Its model `colors` tells the mean of each channel of the tensor that it gets, and keeps that tensor.

    `answer` takes the place of what it would answer to an inference. `breaks` connections end before their answer.
    """

    datatype: str = "FP32"
    shape: list[int] = field(default_factory=lambda: [-1, 3, SIDE, SIDE])
    extensions: list[str] = field(default_factory=lambda: ["binary_tensor_data"])
    others: list[dict[str, Any]] = field(default_factory=list)
    answer: Response | None = None
    delay_s: float = 0.0
    breaks: int = 0
    ready: bool = True
    port: int = 0
    heads: list[dict[str, Any]] = field(default_factory=list)
    """The JSON of every inference."""
    headers: list[dict[str, str]] = field(default_factory=list)
    tensors: list[NDArray[Any]] = field(default_factory=list)
    described: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v2", self._server),
                Route("/v2/models/colors", self._model),
                Route("/v2/models/colors/ready", self._ready),
                Route("/v2/models/colors/infer", self._infer, methods=["POST"]),
                Route("/v2/models/colors/versions/7/infer", self._infer, methods=["POST"]),
                Route("/v2/models/colors/versions/7", self._model),
                Route("/v2/models/{name:path}", self._unknown, methods=["GET", "POST"]),
            ]
        )

    async def _server(self, _: Request) -> Response:
        return JSONResponse({"name": "own", "version": "1", "extensions": self.extensions, "more": 1})

    async def _model(self, _: Request) -> Response:
        self.described += 1
        image = {"name": "pixels", "datatype": self.datatype, "shape": self.shape}
        means = {"name": "means", "datatype": "FP32", "shape": [-1, 3]}
        return JSONResponse({"name": "colors", "versions": ["7"], "inputs": [*self.others, image], "outputs": [means]})

    async def _ready(self, _: Request) -> Response:
        return JSONResponse({}, 200 if self.ready else 503)

    async def _unknown(self, _: Request) -> Response:
        return JSONResponse({"error": "there is\nno such model here"}, 404)

    async def _infer(self, request: Request) -> Response:
        body = await request.body()
        self.headers.append(dict(request.headers))
        length = int(request.headers.get(LENGTH, len(body)))
        head = json.loads(body[:length])
        self.heads.append(head)
        (tensor,) = head["inputs"]
        kind = TYPES[tensor["datatype"]]
        data = np.frombuffer(body[length:], kind) if "data" not in tensor else np.array(tensor["data"], kind)
        assert data.size == math.prod(tensor["shape"])
        self.tensors.append(data.reshape(tensor["shape"]))
        time.sleep(self.delay_s)
        return self.answer or self._means(head)

    def _means(self, head: dict[str, Any]) -> Response:
        images = self.tensors[-1]
        axes = (2, 3) if images.shape[1] == 3 else (1, 2)
        means = images.astype("<f4").mean(axes)
        output = {"name": "means", "datatype": "FP32", "shape": means.shape}
        said = {"model_name": "colors", "id": head.get("id")}
        if not head.get("parameters", {}).get("binary_data_output"):
            return JSONResponse(said | {"outputs": [output | {"data": means.ravel().tolist()}]})
        text = json.dumps(said | {"outputs": [output | {"parameters": {"binary_data_size": means.nbytes}}]}).encode()
        return Response(text + means.tobytes(), headers={LENGTH: str(len(text))}, media_type="application/octet-stream")


@contextmanager
def predicting(predictor: OwnPredictor) -> Iterator[OwnPredictor]:
    """`predictor`, on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    predictor.port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(_breaking(predictor), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield predictor
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def _breaking(predictor: OwnPredictor) -> Any:
    """Its application, of whose connections some end with a reset and no answer."""
    app = predictor.app()

    async def run(scope: Any, receive: Any, send: Any) -> None:
        if not (predictor.breaks and scope.get("path", "").endswith("/infer")):
            return await app(scope, receive, send)
        predictor.breaks -= 1
        transport = receive.__self__.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    return run
