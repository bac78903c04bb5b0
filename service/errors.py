"""Every error a client can see; `problems` answers them.

    ClarifierError
    ├── the key: Unauthorized, Forbidden
    ├── the message: HeadersTooLarge, EmptyBody, MalformedMultipart, MalformedJson, BadBase64, MalformedTensor,
    │   MalformedZip, BodyTooSlow, BodyTooLarge, UnsupportedMedia
    ├── the image: UnsupportedFormat, TooManyPixels, Undecodable, Animated, ExtremeAspect
    ├── the question: InvalidParameter, InvalidInference, WrongField, UnknownModel, NoDetector, NotAcceptable,
    │   TooManyImages
    ├── the job: NoJobs, UnknownJob, JobUnfinished, KeyReused
    ├── the moment: RateLimited, Overloaded, TooBusy, ShortOfMemory, NotReady, Draining, DeadlineExceeded, ClientLeft
    └── behind the client: InferenceFailed, NotFinite, PredictorFailed

Each class says its status, its title and, as its docstring, the page that `/problems/<code>` shows. Details are safe to
show: they hold no paths, no library names, and nothing of the upload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from service.schemas import ParameterProblem

IMAGE_TYPES = "image/jpeg, image/png, image/webp, image/bmp, multipart/form-data"


class ClarifierError(Exception):
    """An error that a client may see; `detail` says what is particular to this one."""

    code: ClassVar[str] = "internal_server_error"
    """Also the `reason` of the metric, and with dashes the name of the page."""
    status: ClassVar[int] = 500
    title: ClassVar[str] = "internal error"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        detail: str = "",
        *,
        limit: int | None = None,
        actual: int | None = None,
        errors: Sequence[ParameterProblem] | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(detail)
        self.detail = detail or self.title
        self.limit = limit
        self.actual = actual
        self.errors = None if errors is None else list(errors)
        self.retry_after_s = retry_after_s
        """At least; more is added, so that refused clients don't return as one."""


class Unauthorized(ClarifierError):
    """This service has keys, and the request shows none that is known. Send yours as `Authorization: Bearer KEY` or as
    `X-API-Key: KEY`."""

    code, status, title = "unauthorized", 401, "a known key is needed"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(ClarifierError):
    """The key is known but has no right to what was asked: `explain` is for explain=true, `costly` for chains with
    aid, zeropur or auto, the model's default chain too, `jobs` for jobs. Whoever runs the service grants rights."""

    code, status, title = "forbidden", 403, "the key may not do this"


class EmptyBody(ClarifierError):
    """The request had no body. Send the image as the raw body or as the multipart field `image`."""

    code, status, title = "empty_body", 400, "the request has no body"


class MalformedMultipart(ClarifierError):
    """The multipart message could not be read: no or a wrong boundary, a truncated part, broken part headers,
    or an image sent as a text field (a part without a file name)."""

    code, status, title = "malformed_multipart", 400, "the multipart message is malformed"


class MalformedJson(ClarifierError):
    """The JSON cannot be read: it is not JSON, not UTF-8 or begins with a byte order mark, is nested too deeply, names
    a member twice, or holds NaN, a number beyond a double's range or half of a surrogate pair."""

    code, status, title = "malformed_json", 400, "the JSON is malformed"


class BadBase64(ClarifierError):
    """An image in JSON is not base64: the standard alphabet, padded, without line breaks. `data:image/png;base64,` may
    stand before it."""

    code, status, title = "bad_base64", 400, "the image is not base64"


class MalformedTensor(ClarifierError):
    """The binary part of an inference request contradicts its lengths: Inference-Header-Content-Length, a
    `binary_data_size`, or the four bytes before an element."""

    code, status, title = "malformed_tensor", 400, "the binary tensors are malformed"


class MalformedZip(ClarifierError):
    """The zip cannot be read front to back: it is none, ends too early, is encrypted, packs a file by another method
    than deflate, or stores one without its size before it."""

    code, status, title = "malformed_zip", 400, "the zip is malformed"


class UnknownModel(ClarifierError):
    """No bundle of that name and version is loaded. GET /models lists what is."""

    code, status, title = "unknown_model", 404, "there is no such model"


class NoJobs(ClarifierError):
    """This service answers images at once or not at all: jobs need CLARIFIER_QUEUE=redis."""

    code, status, title = "no_jobs", 404, "there are no jobs here"


class UnknownJob(ClarifierError):
    """There is no such job: it was never made, was cancelled, has expired, or belongs to another key."""

    code, status, title = "unknown_job", 404, "there is no such job"


class JobUnfinished(ClarifierError):
    """The job has no result yet: some of its images wait or run. GET /jobs/ID says how many are done. Try again after
    the seconds of Retry-After."""

    code, status, title = "job_unfinished", 409, "the job is not done"


class KeyReused(ClarifierError):
    """The Idempotency-Key has made a job of other images or parameters before. Send another key for another job."""

    code, status, title = "idempotency_key_reused", 409, "the idempotency key was used for another job"


class NotAcceptable(ClarifierError):
    """The answer cannot be made in any type that the Accept header allows: image/png, image/webp and
    application/x-npy are what /purify makes, application/zip is what /purify/batch makes; the result of a job is
    application/jsonl or application/zip."""

    code, status, title = "not_acceptable", 406, "the accepted types cannot be produced"


class HeadersTooLarge(ClarifierError):
    """The request has more than 256 headers, or more than 64 KiB of them."""

    code, status, title = "headers_too_large", 431, "the headers are too large"


class BodyTooSlow(ClarifierError):
    """The body did not arrive within CLARIFIER_BODY_TIMEOUT_S, or that of a job came too slowly."""

    code, status, title = "body_too_slow", 408, "the body did not arrive in time"


class BodyTooLarge(ClarifierError):
    """The upload has more bytes than CLARIFIER_MAX_IMAGE_BYTES, or of a job CLARIFIER_MAX_JOB_BYTES, allows."""

    code, status, title = "body_too_large", 413, "the upload has too many bytes"


class TooManyPixels(ClarifierError):
    """The image's header announces more pixels than CLARIFIER_MAX_IMAGE_PIXELS; it was not decoded. Or the images of
    one /purify/batch with size=original have more than four times as many together."""

    code, status, title = "too_many_pixels", 413, "the image has too many pixels"


class TooManyImages(ClarifierError):
    """The request holds more images than one request may, CLARIFIER_MAX_BATCH_SIZE, or a job, CLARIFIER_MAX_JOB_IMAGES,
    or than its rate limit ever lets in at once."""

    code, status, title = "too_many_images", 413, "the request has too many images"


class UnsupportedMedia(ClarifierError):
    """The Content-Type is not an image's, application/octet-stream or multipart/form-data, a part of a multipart
    message is declared to be no image, or the body has a Content-Encoding. Compressed bodies are never inflated."""

    code, status, title = "unsupported_media", 415, "the content type is not supported"
    headers: ClassVar[Mapping[str, str]] = {"Accept-Post": IMAGE_TYPES}


class UnsupportedFormat(ClarifierError):
    """The first bytes are not those of a JPEG, PNG, WebP or BMP image, whatever the Content-Type says. No
    decoder was called."""

    code, status, title = "unsupported_format", 415, "the upload is not an image of a supported format"
    headers: ClassVar[Mapping[str, str]] = {"Accept-Post": IMAGE_TYPES}


class Undecodable(ClarifierError):
    """The image is of a supported format but damaged, truncated, or uses a part of the format that we refuse.
    A JPEG whose pixels are damaged but whose markers are whole may still be read: its decoder fills the gap."""

    code, status, title = "undecodable", 422, "the upload is not a readable image"


class Animated(ClarifierError):
    """The image is animated. Send the frame that is meant as an image of its own."""

    code, status, title = "animated", 422, "animated images are not accepted"


class ExtremeAspect(ClarifierError):
    """One side of the image is more than 50 times the other: a center crop would throw most of it away."""

    code, status, title = "extreme_aspect", 422, "the image is too long and thin"


class InvalidParameter(ClarifierError):
    """A query parameter or header is unknown, repeated or out of range; `errors` points at each."""

    code, status, title = "invalid_parameter", 422, "a parameter is not valid"


class InvalidInference(ClarifierError):
    """An inference request can be read but not be answered: a member, input or output that the model does not have, a
    shape or datatype that it does not take, data that contradict their shape, or numbers outside [0, 1]."""

    code, status, title = "invalid_inference", 422, "the inference request is not valid"


class WrongField(ClarifierError):
    """The multipart fields are not the expected ones: exactly one file, named `image`; on the batch routes and of a
    job one or more, named `images`. Or there is no image in a zip."""

    code, status, title = "wrong_field", 422, "the form has the wrong fields"


class NoDetector(ClarifierError):
    """The model has no AID discriminator, so there is nothing to detect with."""

    code, status, title = "no_detector", 422, "the model has no detector"


class RateLimited(ClarifierError):
    """This key, or this address where there are no keys, asks more often than CLARIFIER_RATE_LIMIT or the key's own
    limit allows. Try again after the seconds of Retry-After."""

    code, status, title = "rate_limited", 429, "too many requests, try again later"


class Overloaded(ClarifierError):
    """Every place in the queue is taken, or those who wait will keep the engine for longer than the request or
    CLARIFIER_MAX_QUEUE_WAIT_MS allows, or the uploads and answers under way fill the memory that is meant for them, or
    as many jobs as CLARIFIER_MAX_JOBS are not done. Try again after the seconds of Retry-After."""

    code, status, title = "queue_full", 429, "the queue is full, try again shortly"


class ClientLeft(ClarifierError):
    """The client closed the connection before its answer: seen in logs and metrics only."""

    code, status, title = "client_left", 499, "the client left"

    def __init__(self, where: str = "queue") -> None:
        """`where` the image was then: `queue`, `running`, or `sent` to a worker, which may have begun."""
        super().__init__()
        self.where = where


class InferenceFailed(ClarifierError):
    """The defense failed on this image. The others of its batch were answered."""

    code, status, title = "inference_failed", 500, "inference failed"


class NotFinite(ClarifierError):
    """The network's answer for this image was not a finite number. The others of its batch were answered."""

    code, status, title = "nan", 500, "the answer is not a finite number"


class PredictorFailed(ClarifierError):
    """The server behind this one, CLARIFIER_PREDICTOR_URL, cannot be reached, failed, or answered what is no answer of
    the Open Inference Protocol. The images were purified, but nobody classified them."""

    code, status, title = "predictor_failed", 502, "the predictor failed"


class NotReady(ClarifierError):
    """No model is ready: bundles are still loading, none is sound, or the engine has stopped."""

    code, status, title = "not_ready", 503, "the service is not ready"


class TooBusy(ClarifierError):
    """More requests are being answered than one process takes at once. Try again after the seconds of
    Retry-After."""

    code, status, title = "too_busy", 503, "too many requests at once"


class ShortOfMemory(ClarifierError):
    """The memory that this process may have is nearly all in use, and this request may need more than is left. Try
    again after the seconds of Retry-After, or send a smaller image."""

    code, status, title = "short_of_memory", 503, "short of memory, try again shortly"


class Draining(ClarifierError):
    """The service is shutting down and takes no new work. Another replica, or a later try, will answer."""

    code, status, title = "draining", 503, "the service is shutting down"
    headers: ClassVar[Mapping[str, str]] = {"Connection": "close"}


class DeadlineExceeded(ClarifierError):
    """The request's own deadline passed: X-Request-Timeout-Ms, or CLARIFIER_REQUEST_TIMEOUT_MS without it."""

    code, status, title = "deadline_exceeded", 504, "the deadline passed"

    was_running = False
    """Whether it passed while the image ran, as far as is known."""
