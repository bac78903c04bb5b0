"""A setting that is wrong stops the start with one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from redis import ConnectionPool

from service.settings import Settings, SettingsError, load_settings


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = load_settings()
    assert settings.model_repository == Path("models/bundles")
    assert (settings.default_model, settings.device) == ("cifar10", "auto")
    assert (settings.engine, settings.queue) == ("torch", "memory")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.max_batch_size, settings.max_queue_delay_ms, settings.max_queue_size) == (32, 0, 256)
    assert (settings.request_timeout_ms, settings.body_timeout_s) == (30_000, 10)
    assert (settings.max_image_bytes, settings.max_image_pixels) == (10 * 2**20, 40_000_000)
    assert (settings.drain_delay_s, settings.drain_timeout_s) == (0, 25)
    assert (settings.max_job_images, settings.max_job_bytes) == (10_000, 2**30)
    assert (settings.max_jobs, settings.job_ttl_s) == (64, 86_400)
    assert settings.cache_ttl_s == 0
    assert (settings.api_keys_file, settings.rate_limit) == (None, None)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARIFIER_PORT", "9001")
    monkeypatch.setenv("CLARIFIER_MAX_QUEUE_DELAY_MS", "0.5")
    monkeypatch.setenv("CLARIFIER_DEVICE", "cuda:1")
    monkeypatch.setenv("CLARIFIER_API_KEYS_FILE", "keys.toml")
    monkeypatch.setenv("CLARIFIER_RATE_LIMIT", "600/minute;10/second")
    settings = load_settings()
    assert (settings.api_keys_file, settings.rate_limit) == (Path("keys.toml"), "600/minute;10/second")
    assert (settings.port, settings.max_queue_delay_ms, settings.device) == (9001, 0.5, "cuda:1")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["CLARIFIER_MAX_BATCHSIZE", "CLARIFIER_REDIS", "clarifier_engines"])
def test_row_79_an_unknown_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=name):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("DEVICE", "gpu"),
        ("ENGINE", "tensorflow"),
        ("QUEUE", "kafka"),
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_QUEUE_SIZE", "-1"),
        ("MAX_QUEUE_DELAY_MS", "-1"),
        ("REQUEST_TIMEOUT_MS", "0"),
        ("REQUEST_TIMEOUT_MS", "inf"),
        ("MAX_QUEUE_DELAY_MS", "nan"),
        ("DRAIN_TIMEOUT_S", "inf"),
        ("CACHE_TTL_S", "-1"),
        ("MAX_IMAGE_BYTES", "10MB"),
        ("MAX_IMAGE_PIXELS", "0"),
        ("MAX_JOB_IMAGES", "0"),
        ("MAX_JOB_BYTES", "1GB"),
        ("MAX_JOBS", "0"),
        ("JOB_TTL_S", "0.5"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "LOUD"),
        ("DEFAULT_MODEL", ""),
        ("REDIS_URL", "http://127.0.0.1"),
        ("REDIS_URL", "redis://127.0.0.1:many"),
        ("REDIS_URL", "redis://127.0.0.1/0?db=first"),
        ("REDIS_URL", "redis://127.0.0.1/0?no_such_option=1"),
        ("WORKER_PORT", "65536"),
        ("RATE_LIMIT", ""),
        ("RATE_LIMIT", "600"),
        ("RATE_LIMIT", "0/minute"),
        ("RATE_LIMIT", "600/minute;often"),
    ],
)
def test_row_79_a_value_out_of_range_is_refused_in_one_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CLARIFIER_{name}", value)
    with pytest.raises(SettingsError, match=f"^CLARIFIER_{name}: ") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"MAX_BATCH_SIZE": "64", "MAX_QUEUE_SIZE": "32"}, ("MAX_BATCH_SIZE", "MAX_QUEUE_SIZE")),
        (
            {"MAX_QUEUE_DELAY_MS": "500", "REQUEST_TIMEOUT_MS": "400"},
            ("MAX_QUEUE_DELAY_MS", "REQUEST_TIMEOUT_MS"),
        ),
    ],
)
def test_row_79_contradictions_are_refused_with_both_names(
    values: dict[str, str], names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"CLARIFIER_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert all(f"CLARIFIER_{name}" in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("queue", "url", "shared"),
    [
        ("memory", None, None),
        ("memory", "redis://there:1/2", "redis://there:1/2"),
        ("memory", "redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis", None, "redis://127.0.0.1:6379/0"),
        ("redis", "unix:///there", "unix:///there"),
    ],
)
def test_gateways_share_in_a_redis_that_is_named_or_that_they_need_anyway(
    queue: str, url: str | None, shared: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLARIFIER_QUEUE", queue)
    if url is not None:
        monkeypatch.setenv("CLARIFIER_REDIS_URL", url)
    assert load_settings().shared_redis_address == shared


@pytest.mark.parametrize(
    "url",
    [
        "redis://:canary@127.0.0.1/0",
        "http://:canary@127.0.0.1/0",
        "redis://:canary#@127.0.0.1/0",
        "redis://:canary/@127.0.0.1/0",
        "redis://127.0.0.1/0?secret=canary",
    ],
)
def test_row_82_a_password_is_never_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLARIFIER_REDIS_URL", url)
    try:
        settings = load_settings()
    except SettingsError as error:
        said = str(error)
    else:
        said = f"{settings!r} {settings.model_dump(mode='json')}"
        assert "canary" in settings.redis_address
    assert "canary" not in said


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://redis:6379/0", "redis://:p%40ss%2F%3Aw%20%C3%B6rd@redis:6379/0"),
        ("rediss://gateway@[::1]:6379/1", "rediss://gateway:p%40ss%2F%3Aw%20%C3%B6rd@[::1]:6379/1"),
        ("unix:///run/redis.sock?db=1", "unix://:p%40ss%2F%3Aw%20%C3%B6rd@/run/redis.sock?db=1"),
    ],
)
def test_a_password_can_come_from_a_file(
    url: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text("p@ss/:w örd\n")
    monkeypatch.setenv("CLARIFIER_REDIS_URL", url)
    monkeypatch.setenv("CLARIFIER_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    settings = load_settings()
    assert settings.redis_address == settings.shared_redis_address == address
    assert ConnectionPool.from_url(address).connection_kwargs["password"] == "p@ss/:w örd"
    assert "örd" not in f"{settings!r} {settings.model_dump(mode='json')}"


@pytest.mark.parametrize(
    ("content", "url", "why"),
    [
        (None, "redis://there", "cannot be read: No such file"),
        (b"", "redis://there", "has to hold one line"),
        (b"\n", "redis://there", "has to hold one line"),
        (b"canary\ncanary\n", "redis://there", "has to hold one line"),
        (b"canary\xff", "redis://there", "cannot be read: it is not UTF-8"),
        (b"canary", "redis://:canary@there", "CLARIFIER_REDIS_URL has a password"),
    ],
)
def test_a_file_without_a_password_stops_the_start(
    content: bytes | None, url: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    monkeypatch.setenv("CLARIFIER_REDIS_URL", url)
    monkeypatch.setenv("CLARIFIER_REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    with pytest.raises(SettingsError, match=why) as refused:
        load_settings()
    assert "CLARIFIER_REDIS_PASSWORD_FILE" in str(refused.value)
    assert "canary" not in str(refused.value)
