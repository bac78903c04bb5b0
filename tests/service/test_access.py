"""Who may ask, what, and how often: over sockets, with keys, with a limit, and with neither."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.access import address_of, create_access
from service.logs import JsonFormatter
from service.rates import MemoryWindows
from service.settings import Settings
from tests.service.conftest import Running, running, until
from tests.service.fakes import FakeBundle, green, png
from tests.service.manifests import fake_manifest
from tests.service.test_keys import entry

GOOD = png(green())
MASTER, PLAIN, SLOW, OTHER = "key-of-the-master", "key-without-rights", "key-with-a-limit", "key-with-another"
CANARY = "canary-0123456789"
OPEN = {"/livez", "/readyz", "/metrics", "/problems/{slug}", "/v2", "/v2/health/live", "/v2/health/ready"}
"""Documented routes that need no key."""


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(
        entry("master", MASTER, 'rights = ["explain", "costly"]', 'rate_limit = "100000/minute"')
        + entry("plain", PLAIN, 'rate_limit = "100000/minute"')
        + entry("explainer", "key-to-explain", 'rights = ["explain"]')
        + entry("heavy", "key-to-spend", 'rights = ["costly"]')
        + entry("canary", CANARY)
        + entry("slow", SLOW, 'rate_limit = "3/minute"')
        + entry("other", OTHER, 'rate_limit = "3/minute"')
        + entry("bursts", "key-for-bursts", 'rate_limit = "4/minute"')
    )
    return path


def with_keys(path: Path, bundle: FakeBundle, **settings: Any) -> Iterator[Running]:
    with running(bundle, api_keys_file=path, **settings) as server:
        server.client.headers["X-API-Key"] = MASTER
        yield server


@pytest.fixture(scope="module")
def guarded(keys_file: Path) -> Iterator[Running]:
    """A server with keys, whose client has one that may do everything."""
    yield from with_keys(keys_file, FakeBundle(), rate_limit="50/minute")


@pytest.fixture(scope="module")
def costly(keys_file: Path) -> Iterator[Running]:
    """The same with a model whose default defense is a costly one."""
    manifest = fake_manifest(auto=True).model_copy(update={"default_defense": "auto"})
    yield from with_keys(keys_file, FakeBundle(manifest))


def ask(server: Running, path: str, *headers: tuple[str, str | bytes], method: str = "POST") -> httpx.Response:
    """A request with no other key than `headers` have."""
    given = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    content = GOOD if method == "POST" else None
    return httpx.request(method, f"http://127.0.0.1:{server.port}{path}", headers=given, content=content, timeout=30)


def classify(server: Running, key: str, query: str = "defense=none") -> httpx.Response:
    return ask(server, f"/classify?{query}", ("X-API-Key", key))


# --- keys


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {PLAIN}")],
        [("authorization", f"bearer {PLAIN}")],
        [("X-API-Key", PLAIN)],
        [("x-api-key", PLAIN), ("Authorization", f"Bearer {PLAIN}")],
        [("X-API-Key", PLAIN), ("Authorization", "Basic dXNlcjpwYXNz")],  # for a proxy
    ],
)
def test_a_known_key_is_let_in(guarded: Running, headers: list[tuple[str, str]]) -> None:
    assert ask(guarded, "/classify?defense=none", *headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("X-API-Key", "")],
        [("X-API-Key", "unknown")],
        [("X-API-Key", PLAIN[:-1])],
        [("X-API-Key", PLAIN + "x")],
        [("X-API-Key", PLAIN.upper())],
        [("X-API-Key", "plain")],
        [("X-API-Key", f"Bearer {PLAIN}")],
        [("Authorization", PLAIN)],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {PLAIN}")],
        [("Authorization", f"Bearer {PLAIN}, Bearer {PLAIN}")],
        [("X-API-Key", "clé".encode()), ("Accept", "*/*")],
        [("X-API-Key", PLAIN.encode() + b"\xff\x80")],
        [("X-API-Key", PLAIN), ("Authorization", f"Bearer {MASTER}")],
        [("X-API-Key", PLAIN), ("Authorization", "Bearer unknown")],
        [("X-API-Key", PLAIN), ("X-API-Key", MASTER)],
        [("Authorization", f"Bearer {PLAIN}"), ("Authorization", f"Bearer {MASTER}")],
        [("X-API-Key", "k" * 60_000)],
        [("Authorization", f"Bearer {PLAIN}{' ' * 500}x")],
        [("Authorization", f"Bearer {' ' * 200}{PLAIN}{' ' * 500}x")],
    ],
)
def test_row_56_no_key_or_an_unknown_one_is_401(guarded: Running, headers: list[tuple[str, str | bytes]]) -> None:
    response = ask(guarded, "/classify?defense=none", *headers)
    guarded.refuses(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert PLAIN[:-1].lower() not in response.text.lower()


def test_row_56_the_hash_of_a_key_opens_nothing(guarded: Running, keys_file: Path) -> None:
    digests = [line.split('"')[1] for line in keys_file.read_text().splitlines() if line.startswith("sha256")]
    assert len(digests) > 3
    assert {classify(guarded, digest).status_code for digest in digests} == {401}


def exchange(port: int, head: bytes) -> bytes:
    """Send `head`, and nothing after it; what comes back before the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        answer = b""
        with suppress(ConnectionError):  # it does not read all of a megabyte
            connection.sendall(head)
            while piece := connection.recv(65536):
                answer += piece
        return answer


@pytest.mark.parametrize(("length", "status"), [(60_000, 401), (2**20, 431)])
def test_row_56_a_key_of_a_megabyte_is_not_even_hashed(
    guarded: Running, monkeypatch: pytest.MonkeyPatch, length: int, status: int
) -> None:
    sizes = list[int]()

    def noted(secret: bytes) -> bytes:
        sizes.append(len(secret))
        return b""

    monkeypatch.setattr("service.access.digest_of", noted)
    for header in (b"X-API-Key: ", b"Authorization: Bearer "):
        head = b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n" + header + b"k" * length + b"\r\n\r\n"
        assert exchange(guarded.port, head).startswith(b"HTTP/1.1 %d " % status)
    assert sizes == []
    monkeypatch.undo()
    assert guarded.still_answers()


def test_a_request_without_a_key_is_refused_before_its_body_is_read(guarded: Running) -> None:
    for path in (b"/classify", b"/classify/batch", b"/purify", b"/detect"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n"  # and no body
        answer = exchange(guarded.port, head)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"connection: close" in answer.lower()


def test_a_key_that_was_taken_out_of_the_file_is_unknown_from_the_next_start_on(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("kept", "kept") + entry("revoked", "revoked"))
    assert classify(start(api_keys_file=path), "revoked").status_code == 200
    path.write_text(entry("kept", "kept"))
    server = start(api_keys_file=path)
    assert classify(server, "revoked").status_code == 401
    assert classify(server, "kept").status_code == 200


def test_every_route_but_those_for_everybody_needs_a_key(guarded: Running) -> None:
    described = guarded.client.get("/openapi.json").json()
    documented = {(method, path) for path, item in described["paths"].items() for method in item}
    needing = {(method, path) for method, path in documented if path not in OPEN}
    assert ("post", "/classify") in needing
    assert ("get", "/models") in needing
    assert ("get", "/models/{name}") in needing
    for method, path in documented:
        address = path.replace("{slug}", "not-found").replace("{name}", "colors")
        response = ask(guarded, address, method=method.upper())
        assert (response.status_code == 401) == ((method, path) in needing), path
        security = described["paths"][path][method].get("security", [])
        assert security == ([{"bearer": []}, {"header": []}] if (method, path) in needing else []), path


@pytest.mark.parametrize(
    "path", ["/ping", "/healthz", "/health", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems/nan"]
)
def test_probes_and_documentation_need_no_key(guarded: Running, path: str) -> None:
    assert ask(guarded, path, method="GET").status_code == 200


def test_the_documentation_says_how_to_send_a_key(guarded: Running, service: Running) -> None:
    schemes = guarded.client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["header"]["type"], schemes["header"]["in"], schemes["header"]["name"]) == (
        "apiKey",
        "header",
        "X-API-Key",
    )
    responses = guarded.client.get("/openapi.json").json()["paths"]["/classify"]["post"]["responses"]
    assert {"401", "403", "429"} <= responses.keys()
    open_to_all = service.client.get("/openapi.json").json()
    assert "securitySchemes" not in open_to_all["components"]
    assert "security" not in open_to_all["paths"]["/classify"]["post"]


def test_without_settings_nobody_is_asked_for_anything(service: Running) -> None:
    assert create_access(Settings(), MemoryWindows()) is None
    assert service.gateway.access is None
    assert classify(service, "any").status_code == 200
    assert classify(service, "any", "defense=zeropur&explain=true").status_code == 200


# --- rights


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/classify?explain=true&defense=none", PLAIN, 403),
        ("/classify?explain=true&defense=none", "key-to-spend", 403),
        ("/classify?explain=true&defense=none", "key-to-explain", 200),
        ("/classify?defense=aid", PLAIN, 403),
        ("/classify?defense=zeropur", PLAIN, 403),
        ("/classify?defense=zeropur:coarse", "key-to-explain", 403),
        ("/classify?defense=atop,aid", PLAIN, 403),
        ("/classify?defense=atop:rt3,aid:code", PLAIN, 403),
        ("/classify?defense=atop,aid", "key-to-spend", 200),
        ("/classify?defense=atop,aid&explain=true", "key-to-spend", 403),
        ("/classify?defense=atop,aid&explain=true", MASTER, 200),
        ("/purify?defense=aid", PLAIN, 403),
        ("/purify?defense=aid", "key-to-spend", 200),
        ("/purify?defense=atop&explain=true", PLAIN, 200),  # it has no effect there
        ("/classify", PLAIN, 200),
        ("/detect", PLAIN, 200),
    ],
)
def test_row_56_what_a_key_has_no_right_to_is_403(guarded: Running, path: str, key: str, status: int) -> None:
    response = ask(guarded, path, ("X-API-Key", key))
    assert response.status_code == status
    if status == 403:
        problem = guarded.refuses(response, 403, "forbidden")
        assert problem["detail"] in ("the key has no right `explain`", "the key has no right `costly`")
        assert key not in response.text


def test_a_costly_defense_needs_its_right_also_where_it_is_the_default(costly: Running) -> None:
    assert costly.client.post("/classify", content=GOOD).json()["defense"] == "auto"
    for path in ("/classify", "/purify", "/classify?defense=auto"):
        costly.refuses(ask(costly, path, ("X-API-Key", PLAIN)), 403, "forbidden")
    assert classify(costly, PLAIN, "defense=none").status_code == 200


def test_what_is_forbidden_is_refused_before_the_body_is_read(guarded: Running) -> None:
    head = f"POST /classify?explain=true HTTP/1.1\r\nHost: h\r\nX-API-Key: {PLAIN}\r\nContent-Length: 999999\r\n\r\n"
    assert exchange(guarded.port, head.encode()).startswith(b"HTTP/1.1 403 ")


# --- rates


def test_row_49_a_key_that_sends_too_much_is_429_and_others_are_not(guarded: Running) -> None:
    assert [classify(guarded, SLOW).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    response = classify(guarded, SLOW)
    problem = guarded.refuses(response, 429, "rate_limited")
    assert problem["limit"] == 3
    assert 55 <= int(response.headers["retry-after"]) <= 63
    assert classify(guarded, OTHER).status_code == 200  # the same limit, of its own
    assert classify(guarded, PLAIN).status_code == 200


def test_a_key_without_a_limit_of_its_own_has_that_of_the_settings(
    keys_file: Path, start: Callable[..., Running]
) -> None:
    server = start(api_keys_file=keys_file, rate_limit="2/minute")
    assert [classify(server, "key-to-explain").status_code for _ in range(3)] == [200, 200, 429]
    assert [classify(server, "key-to-spend").status_code for _ in range(3)] == [200, 200, 429]
    assert [classify(server, SLOW).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_every_route_that_needs_a_key_counts_and_no_other_does(start: Callable[..., Running]) -> None:
    server = start(rate_limit="3/minute")
    assert "securitySchemes" not in server.client.get("/openapi.json").json()["components"]
    for path in ("/livez", "/metrics", "/docs", "/openapi.json", "/nowhere"):
        assert "retry-after" not in ask(server, path, method="GET").headers
    assert ask(server, "/models", method="GET").status_code == 200
    assert ask(server, "/detect").status_code == 200
    assert ask(server, "/classify?defense=what").status_code == 422  # let in by its rate, whatever comes of it
    for path, method in (("/models", "GET"), ("/models/colors", "GET"), ("/purify", "POST"), ("/classify", "POST")):
        response = ask(server, path, method=method)
        assert (response.status_code, response.json()["code"]) == (429, "rate_limited")
        assert int(response.headers["retry-after"]) >= 1
    assert ask(server, "/readyz", method="GET").status_code == 200
    assert server.metric("clarifier_rejected_total", reason="rate_limited") == 4


def batch(server: Running, key: str, count: int) -> httpx.Response:
    files = [("images", (f"{i}.png", GOOD)) for i in range(count)]
    headers = {"X-API-Key": key}
    return httpx.post(f"http://127.0.0.1:{server.port}/classify/batch?defense=none", files=files, headers=headers)


def test_each_image_of_a_batch_counts(guarded: Running) -> None:
    key = "key-for-bursts"  # four a minute
    guarded.bundle.batches.clear()
    too_many = batch(guarded, key, 5)
    problem = guarded.refuses(too_many, 413, "too_many_images")  # one hit
    assert (problem["limit"], problem["actual"]) == (4, 5)
    assert batch(guarded, key, 2).status_code == 200  # three
    guarded.refuses(batch(guarded, key, 2), 429, "rate_limited")  # its first is the fourth, and its second too many
    guarded.refuses(classify(guarded, key), 429, "rate_limited")


def test_where_there_are_no_keys_each_address_has_a_limit(start: Callable[..., Running]) -> None:
    server = start(rate_limit="2/minute")

    def ask_from(address: str) -> int:
        transport = httpx.HTTPTransport(local_address=address)
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{server.port}") as client:
            headers = {"X-Forwarded-For": "192.0.2.7"}  # believed from nobody
            return client.post("/classify?defense=none", content=GOOD, headers=headers).status_code

    assert [ask_from("127.0.0.1") for _ in range(3)] == [200, 200, 429]
    assert [ask_from("127.0.0.2") for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.1", 5), "192.0.2.1"),
        (("::ffff:192.0.2.1", 5), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::"),
        (("2001:db8:1:2::", 5), "2001:db8:1:2::"),
        (("2001:db8:1:3::1", 5), "2001:db8:1:3::"),
        (("fe80::1%eth0", 5), "fe80::"),
        (("a:b", 5), "a:b"),
        (None, ""),  # a Unix socket
    ],
)
def test_addresses_of_one_customer_are_counted_together(client: tuple[str, int] | None, address: str) -> None:
    assert address_of({"client": client}) == address


# --- what is written down


def test_the_line_of_a_request_has_the_name_of_its_key(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "service.requests")
    classify(guarded, PLAIN)
    classify(guarded, PLAIN, "explain=true")
    classify(guarded, "unknown")
    until(lambda: len(lines(caplog)) == 3)
    assert [line.get("key") for line in lines(caplog)] == ["plain", "plain", None]
    assert [line.get("code") for line in lines(caplog)] == [None, "forbidden", "unauthorized"]
    assert {line["route"] for line in lines(caplog)} == {"/classify"}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "service.requests"]


def test_row_82_no_key_appears_in_logs_metrics_documentation_or_errors(
    keys_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    unknown = f"{CANARY}-unknown"
    answers = list[httpx.Response]()
    for server in with_keys(keys_file, FakeBundle(), rate_limit="9/minute"):
        for key in (CANARY, unknown):
            for path in (
                "/classify",
                "/classify?explain=true",
                "/classify?defense=x",
                f"/detect?api_key={key}",
                "/models",
            ):
                method = "GET" if path == "/models" else "POST"
                answers.append(ask(server, path, ("X-API-Key", key), method=method))
                answers.append(ask(server, path, ("Authorization", f"Bearer {key}"), method=method))
            answers.append(ask(server, "/classify", ("X-API-Key", key), ("Authorization", f"Bearer {MASTER}")))
        with monkeypatch.context() as patch:
            patch.setattr("service.routes.draw_seed", lambda question: [][1])  # ends in a stack in the log
            answers.append(ask(server, "/classify", ("X-API-Key", MASTER)))
        answers += [ask(server, path, method="GET") for path in ("/metrics", "/docs", "/openapi.json", "/readyz")]
    assert {200, 401, 403, 422, 429, 500} <= {answer.status_code for answer in answers}
    ours = [record for record in caplog.records if not record.name.startswith("http")]  # those are the test's client
    written = [JsonFormatter().format(record) for record in ours]
    assert any('"key": "canary"' in line for line in written)
    assert any("stack" in line for line in written)
    for text in [*written, *(answer.text + str(answer.headers) for answer in answers)]:
        assert unknown not in text
        assert CANARY not in text
        assert MASTER not in text


def test_row_83_cached_answers_are_found_by_the_key_they_were_made_for(
    start: Callable[..., Running], keys_file: Path
) -> None:
    server = start(api_keys_file=keys_file, cache_ttl_s=60)
    for key, hits in ((PLAIN, 0), (PLAIN, 1), (MASTER, 1), (MASTER, 2)):
        assert classify(server, key).status_code == 200
        assert server.metric("clarifier_cache_requests_total", result="hit") == hits


def infer(server: Running, key: str, count: int = 1, **parts: Any) -> httpx.Response:
    images = {"name": "images", "shape": [count, 3, 8, 8], "datatype": "FP32", "data": [0.5] * (count * 192)}
    headers = {"X-API-Key": key}
    return server.client.post("/v2/models/colors/infer", json={"inputs": [images], **parts}, headers=headers)


def test_an_inference_needs_the_rights_of_what_it_asks_and_each_image_counts(guarded: Running, keys_file: Path) -> None:
    costly, score = {"parameters": {"defense": "zeropur"}}, {"outputs": [{"name": "aid_score"}]}
    asked: list[tuple[str, dict[str, Any]]]
    asked = [(PLAIN, costly), (PLAIN, score), (MASTER, costly), (MASTER, score)]
    assert [infer(guarded, key, **parts).status_code for key, parts in asked] == [403, 403, 200, 200]
    assert infer(guarded, "nobody").status_code == 401
    with running(FakeBundle(), api_keys_file=keys_file) as fresh:
        assert [infer(fresh, SLOW, 2).status_code for _ in range(2)] == [200, 429]  # of three a minute
        assert infer(fresh, OTHER, 4).status_code == 413
