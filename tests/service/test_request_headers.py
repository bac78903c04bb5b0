"""Headers by name."""

from __future__ import annotations

from service.request_headers import headers_of


def test_the_first_of_each_name_counts_and_is_read_once() -> None:
    scope = {"headers": [(b"accept", b"image/png"), (b"x-name", b"\xe9"), (b"accept", b"image/webp")]}
    headers = headers_of(scope)
    assert headers == {"accept": "image/png", "x-name": "é"}
    assert headers_of(scope) is headers
