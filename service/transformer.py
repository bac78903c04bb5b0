"""`python -m service.transformer`: the service as KServe starts a custom transformer, by arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from service.__main__ import start


def settings_of(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """The settings that KServe's arguments stand for; what they leave out, the environment says."""
    parser = argparse.ArgumentParser(
        prog="python -m service.transformer",
        description="Purify the images of a predictor's clients. The arguments are those that KServe appends; all else "
        "is set by environment variables, see service/README.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--predictor_host", required=True, help="host, or host:port, of the predictor")
    parser.add_argument("--predictor_use_ssl", choices=["true", "false"], default="false", type=str.lower)
    parser.add_argument("--predictor_protocol", "--protocol", choices=["v2"], help="the Open Inference Protocol alone")
    parser.add_argument("--http_port", type=int, help="where to listen; CLARIFIER_PORT")
    parser.add_argument("--model_name", help="without effect: the address of a request names the predictor's model")
    parser.add_argument("--workers", help="without effect: one process has all of a device")
    said = parser.parse_args(arguments)
    scheme = "https" if said.predictor_use_ssl == "true" else "http"
    given: dict[str, object] = {"predictor_url": f"{scheme}://{said.predictor_host}"}
    return given if said.http_port is None else given | {"port": said.http_port}


if __name__ == "__main__":
    start(**settings_of())
