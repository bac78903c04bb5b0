# syntax=docker/dockerfile:1
# The images of the service, `cpu` (the default target) and `cuda`, and the one that trains, `training`.
#
#   docker build --tag clarifier .                       docker build --target cuda --tag clarifier:cuda .
#   docker run --rm --publish 127.0.0.1:8000:8000 clarifier                      the gateway, its engine in it
#   docker run --rm clarifier service.worker                                     a worker; see docker-compose.yml
#
# A bundle repository mounted at /app/models/bundles takes the place of the shipped bundles.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# What every stage stands on.
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app

# The pinned packages, in environments that hold no pip. The project is only named there: its code is copied later, so
# that a change of it installs nothing again.
FROM base AS build
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/clarifier
COPY pyproject.toml requirements.lock README.md LICENSE ./

FROM build AS build-cpu
# Where torch is without CUDA, which is most of the other's size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/clarifier/bin/python install --no-deps --index-url "${TORCH_INDEX}" \
        "$(grep --only-matching '^torch==[^ ]*' requirements.lock)" \
    && /opt/pip/bin/pip --python /opt/clarifier/bin/python install --constraint requirements.lock '.[service,tracing,evidence,onnx]' \
    && /opt/clarifier/bin/python -c 'import sys, torch; sys.exit("this torch is for CUDA" if torch.version.cuda else 0)'

# onnxruntime-gpu finds CUDA in the packages that torch brings. It has the modules of onnxruntime, so one alone is there.
FROM build AS build-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/clarifier/bin/python install --constraint requirements.lock '.[service,tracing,evidence]' \
        "$(sed -n 's/^onnxruntime\(==[^ ]*\).*/onnxruntime-gpu\1/p' requirements.lock)"

FROM build-cpu AS build-training
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/clarifier/bin/python install --constraint requirements.lock '.[training]'

# The code, compiled, with the shipped bundles.
FROM base AS code
COPY models models
COPY service service
RUN python3 -m compileall -q --invalidation-mode unchecked-hash .

FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Clarifier" \
      org.opencontainers.image.description="Serves defended image classifiers: AToP, AID and ZeroPur purification" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 clarifier \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin clarifier
ENV PATH=/opt/clarifier/bin:${PATH}
ENTRYPOINT ["python", "-m"]
STOPSIGNAL SIGTERM

FROM runtime AS serving
USER 10001:10001
ENV CLARIFIER_HOST=0.0.0.0 CLARIFIER_LOG_FORMAT=json MALLOC_ARENA_MAX=2
EXPOSE 8000
# Of a worker too, where CLARIFIER_WORKER_PORT is 8000. It is ready when its bundles are loaded and warm.
HEALTHCHECK --interval=5s --timeout=3s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["service"]

FROM serving AS cuda
COPY --from=build-cuda /opt/clarifier /opt/clarifier
COPY --from=code /app /app

# It writes what it makes below /app/runs, which is to be mounted. Data are mounted anywhere, and named by --data.
FROM runtime AS training
RUN install --directory --owner=10001 --group=10001 runs
USER 10001:10001
COPY --from=build-training /opt/clarifier /opt/clarifier
COPY --from=code /app /app
COPY training training
VOLUME ["/app/runs"]
CMD ["training", "--help"]

# The last is what is built without a --target.
FROM serving AS cpu
COPY --from=build-cpu /opt/clarifier /opt/clarifier
COPY --from=code /app /app
