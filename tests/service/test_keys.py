"""Keys at rest: a file of hashes that is read whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from service.keys import Right, digest_of, new_key, read_keys
from service.settings import SettingsError

ROOT = Path(__file__).parents[2]
SECRET = "clarifier_canary-canary-canary"


def entry(name: str, secret: str = SECRET, *lines: str) -> str:
    """A table of the file."""
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    return "\n".join(["[[key]]", f'name = "{name}"', f'sha256 = "{sha256}"', *lines, ""])


def test_a_key_is_found_by_the_digest_of_its_secret(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        entry("mobile", "one", 'rights = ["explain", "jobs"]', 'rate_limit = "10/second"') + entry("web", "two")
    )
    keys = read_keys(path)
    mobile, web = keys[digest_of(b"one")], keys[digest_of(b"two")]
    assert (mobile.name, mobile.rights) == ("mobile", frozenset({Right.EXPLAIN, Right.JOBS}))
    assert [str(limit) for limit in mobile.rate_limit or ()] == ["10 per 1 second"]
    assert (web.name, web.rights, web.rate_limit) == ("web", frozenset(), None)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "key: Field required"),
        ("key = []", "key: "),
        ("[[keys]]\nname = 'a'", "key: Field required"),
        ("[key]\nname = 'a'", "key: "),
        ("[[key]]\nname = 'a'", "key 1 sha256: Field required"),
        (entry("a").replace("[[key]]", "[[key]]\ncolor = 'red'"), "key 1 color: Extra inputs are not permitted"),
        (entry("a", "one") + entry("b", "two", 'rights = ["everything"]'), "key 2 rights "),
        (entry("a", SECRET, 'rate_limit = "often"'), "key 1 rate_limit: should be like 600/minute"),
        (entry("a", SECRET, "rate_limit = 600"), "key 1 rate_limit: should be like 600/minute"),
        (entry("two words"), "key 1 name: "),
        (entry("line\\nbreak"), "key 1 name: "),
        (entry("a", "one") + entry("a", "two"), "two keys have the same name: a"),
        (entry("a") + entry("b"), "two keys have the same sha256: a and b"),
        (f"[[key]]\nname = 'a'\nsha256 = '{SECRET}'", "key 1 sha256: "),
        (f"[[key]]\nname = 'a'\nsha256 = '{'AB' * 32}'", "key 1 sha256: "),
        ("[[key]\n", "is not a TOML file: "),
    ],
)
def test_row_79_a_file_that_is_not_sound_is_refused_in_one_line_without_its_secrets(
    text: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"^CLARIFIER_API_KEYS_FILE: ") as caught:
        read_keys(path)
    message = str(caught.value)
    assert why in message
    assert "\n" not in message
    assert "canary" not in message


def test_row_79_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"[[key]]\nname = '\xe9'\n")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(SettingsError, match=r"^CLARIFIER_API_KEYS_FILE: ") as caught:
            read_keys(path)
        assert "\n" not in str(caught.value)


def test_new_keys_have_256_random_bits_in_plain_letters() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {len("clarifier_") + 43}
    assert all(key.isascii() and key.isprintable() for key in keys)


def make_key(name: str) -> subprocess.CompletedProcess[str]:
    """`python -m service.keys NAME`."""
    command = [sys.executable, "-m", "service.keys", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_shows_a_key_once_and_prints_the_lines_to_add(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("first"))
    made = make_key("second")
    assert made.returncode == 0
    key = made.stderr.strip().split()[-1]
    assert key not in made.stdout
    with path.open("a") as file:
        file.write(made.stdout)
    keys = read_keys(path)
    assert keys[digest_of(key.encode())].name == "second"
    assert keys[digest_of(key.encode())].rights == frozenset()
    path.write_text(path.read_text().replace("# rights", "rights").replace("# rate_limit", "rate_limit"))
    granted = read_keys(path)[digest_of(key.encode())]
    assert granted.rights == frozenset(Right)
    assert granted.rate_limit


def test_the_command_refuses_a_name_that_a_file_may_not_have() -> None:
    made = make_key('a"b')
    assert (made.returncode, made.stdout) == (2, "")
    assert "clarifier_" not in made.stderr
