"""Everything that can be set from outside, and the only file that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.rates import read_rate_limits

PREFIX = "CLARIFIER_"
SECRETS = frozenset({"redis_url"})
"""Fields whose values no message repeats."""
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class SettingsError(ValueError):
    """A setting that stops the start; the message is one line that names it."""


def _predictor_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("is not http:// or https:// and a host")
    if parts.username is not None:
        raise ValueError("names a user: a predictor is not asked with a password")
    return text.rstrip("/")


def _rate_limit(text: str) -> str:
    read_rate_limits(text)
    return text


class Settings(BaseSettings):
    """The settings, frozen. Every field is an environment variable: `CLARIFIER_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    model_repository: Path = Path("models/bundles")
    """Directory of bundles, `<name>/<version>/`."""
    default_model: Annotated[str, Field(min_length=1)] = "cifar10"
    """The model of requests that name none: `name` (the newest version) or `name@version`."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$")] = "auto"

    engine: Literal["torch"] = "torch"
    """What runs the networks."""
    predictor_url: Annotated[str, AfterValidator(_predictor_url)] | None = None
    """Of a server of the Open Inference Protocol that classifies what is purified here: this service is then its
    transformer, and its models are those below /v2. Unset: the bundles classify."""
    queue: Literal["memory", "redis"] = "memory"
    """Where images wait: in this process, with the engine in it; or in Redis, for engines in workers."""
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Of the Redis that gateways and workers meet in; it may hold a password, and is never logged. One that is set is
    also where gateways share rate limits and cached answers, with QUEUE=memory too."""
    redis_password_file: Path | None = None
    """Its only line is the password for `redis_url`, which then has none: for secrets that are mounted as files."""
    worker_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where a worker answers /livez, /readyz and /metrics; None: nowhere."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes any free port and prints it."""

    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = 32
    """Images that run together; also the most images of one `/classify/batch` or `/purify/batch`."""
    auto_strong_per_s: NonNegativeFloat = 0.0
    """Images for which an engine may run a strong chain of `auto`; beyond it they get the cheap one. 0: all may."""
    max_queue_delay_ms: NonNegativeFloat = 0.0
    """How long the oldest image waits for company before its batch leaves unfilled, while the engine has nothing to do.
    While it runs, company gathers by itself."""
    max_queue_size: PositiveInt = 256
    """Images that may wait; one more is answered 429."""
    max_queue_wait_ms: NonNegativeFloat = 4000
    """How long an image may be expected to wait until its batch runs, unless that is the next; one that would wait
    longer is answered 429. 0: as long as its deadline allows."""
    request_timeout_ms: PositiveFloat = 30_000
    """The longest deadline of a request; `X-Request-Timeout-Ms` can only shorten it."""
    body_timeout_s: PositiveFloat = 10.0
    """How long a client may take to send its body."""

    max_image_bytes: Annotated[int, Field(ge=1024)] = 10 * 1024 * 1024
    max_image_pixels: Annotated[int, Field(ge=1, le=500_000_000)] = 40_000_000

    max_job_images: PositiveInt = 10_000
    max_job_bytes: PositiveInt = 2**30
    """Of a job's body, and of its images when they are prepared."""
    max_jobs: Annotated[int, Field(ge=1, le=10_000)] = 64
    """That are not done; one more is answered 429."""
    job_ttl_s: Annotated[float, Field(ge=1, le=31_536_000)] = 86_400.0
    """After it was made, a job and its result are forgotten."""

    cache_ttl_s: NonNegativeFloat = 0.0
    """How long an answer may serve for the same image and question again; 0: no answer is kept."""
    api_keys_file: Path | None = None
    """TOML, see `service.keys`. Unset: open to everybody."""
    rate_limit: Annotated[str, AfterValidator(_rate_limit)] | None = None
    """Of each key, or of each address where there are no keys: `600/minute`."""
    similarity_limit: Annotated[int, Field(ge=0)] = 0
    """Near-duplicates of one image that a client may send before each further one is an alert; 0: nobody looks."""
    shadow_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of answered images that are also run undefended and scored by AID, beside the requests, for metrics."""
    evidence_dir: Path | None = None
    """Where images that looked unnatural to AID are kept, encrypted, with what became of them. Unset: nowhere."""
    evidence_recipient: str | None = None
    """Whom they are encrypted to: a public key of age, `age1...`."""
    evidence_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of them that is kept."""
    evidence_days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    """After which they are deleted."""

    drain_delay_s: NonNegativeFloat = 0.0
    """After SIGTERM: not ready, but still accepting, until load balancers have noticed."""
    drain_timeout_s: NonNegativeFloat = 25.0
    """Then: how long accepted requests may take before the rest is answered 503."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "text"

    _redis_address: SecretStr = PrivateAttr(SecretStr(""))

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(REDIS_SCHEMES):
            raise ValueError(f"is none of {', '.join(REDIS_SCHEMES)}")
        _check_redis_url(url.get_secret_value())
        return url

    @property
    def redis_address(self) -> str:
        """`redis_url` with the password of `redis_password_file`: for nobody's eyes."""
        return self._redis_address.get_secret_value()

    @property
    def shared_redis_address(self) -> str | None:
        """Where gateways share rate limits and cached answers; None if each has its own."""
        is_used = self.queue == "redis" or "redis_url" in self.model_fields_set
        return self.redis_address if is_used else None

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        if self.max_batch_size > self.max_queue_size:
            raise ValueError(_contradiction("MAX_BATCH_SIZE is larger than MAX_QUEUE_SIZE"))
        if self.max_queue_delay_ms >= self.request_timeout_ms:
            raise ValueError(_contradiction("MAX_QUEUE_DELAY_MS is not below REQUEST_TIMEOUT_MS"))
        if (self.evidence_dir is None) != (self.evidence_recipient is None):
            raise ValueError(_contradiction("EVIDENCE_DIR and EVIDENCE_RECIPIENT need each other"))
        return self

    @model_validator(mode="after")
    def _password(self) -> Self:
        url = self.redis_url.get_secret_value()
        if self.redis_password_file is not None:
            if urlsplit(url).password is not None:
                raise ValueError(_contradiction("REDIS_URL has a password, and so has REDIS_PASSWORD_FILE"))
            url = _with_password(url, _read_password(self.redis_password_file))
        self._redis_address = SecretStr(url)
        return self


def _check_redis_url(url: str) -> None:
    """Raises ValueError, and what it says is nothing of the URL: a part that cannot be read may be of the password."""
    from redis.asyncio import ConnectionPool  # here, because a service without Redis need not load it

    try:
        ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError):
        raise ValueError("is no address of a Redis") from None


def _read_password(path: Path) -> str:
    name = f"{PREFIX}REDIS_PASSWORD_FILE"
    try:
        password = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{name}: {path} cannot be read: {why}") from None
    if not password or "\n" in password:
        raise ValueError(f"{name}: {path} has to hold one line, the password")
    return password


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.removesuffix(':')}:{quote(password, safe='')}@{place}").geturl()


def _contradiction(sentence: str) -> str:
    return " ".join(PREFIX + word if word.isupper() and "_" in word else word for word in sentence.split())


def traces_are_wanted() -> bool:
    """Whether OpenTelemetry's own variables name a collector for traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(os.environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def load_settings(**given: object) -> Settings:
    """The settings of the environment, and of `given` in their place.

    Raises SettingsError for an unknown `CLARIFIER_` name, a value out of range, or two that contradict.
    """
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"{name} is not a setting of Clarifier")
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    why = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return why
    name = str(problem["loc"][0]).upper().removeprefix(PREFIX)
    if name.lower() in SECRETS:
        return f"{PREFIX}{name}: {why}"
    return f"{PREFIX}{name}: {why}, not {problem['input']!r}"
