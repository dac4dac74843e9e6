# syntax=docker/dockerfile:1
# GLM-Image on Triton, for x86_64 and aarch64 (cpu: x86_64):
#   docker build --target cuda   -t glm-image:cuda .
#   docker build --target ascend -t glm-image:ascend .
#   docker build --target cpu    -t glm-image:cpu --build-arg SYSTEM=python .
# The targets share every step but the system that they stand on.
# Weights are not part of an image; mount them at /checkpoint. See docs/containers.md.

# The defaults are local names, to be replaced: pass the full names of the vendors' images, or tag them so. A digest
# (sha256:...) pins the content of an image as well.
# Triton 26.07 or newer with its Python backend, which links the image's Python.
ARG TRITON_IMAGE=tritonserver:26.07-py3
ARG TRITON_DIGEST=
# CANN for the card (910b, a3, ...), compatible with the torch-npu of constraints.txt.
ARG CANN_IMAGE=cann:8.5.0-910b-ubuntu22.04-py3.11
ARG CANN_DIGEST=
# Debian or Ubuntu with Python 3.11 or 3.12, for a server without accelerator: Triton comes from the package index.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG PYTHON_DIGEST=
# triton or python: what the image stands on.
ARG SYSTEM=triton

FROM ${CANN_IMAGE}${CANN_DIGEST:+@${CANN_DIGEST}} AS cann

# hadolint ignore=DL3006
FROM ${TRITON_IMAGE}${TRITON_DIGEST:+@${TRITON_DIGEST}} AS triton
ARG TRITON_IMAGE
ARG TRITON_DIGEST
LABEL org.opencontainers.image.base.name="$TRITON_IMAGE" org.opencontainers.image.base.digest="$TRITON_DIGEST"

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS python
ARG PYTHON_IMAGE
ARG PYTHON_DIGEST
LABEL org.opencontainers.image.base.name="$PYTHON_IMAGE" org.opencontainers.image.base.digest="$PYTHON_DIGEST"

# Common to all targets: system packages, the project, an unprivileged user.
# hadolint ignore=DL3006
FROM ${SYSTEM} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# A compiler and Python's headers, since kernels written in Triton (the language) are compiled at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin glm-image \
    && python3 -m venv --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/glm-image
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY requirements requirements
COPY python_backends python_backends
COPY client client
COPY gateway gateway
COPY model_repository model_repository
COPY scripts/serve scripts/serve
COPY scripts/lib scripts/lib
COPY scripts/download scripts/download.py scripts/
COPY containers containers
# A vendor's builds of these are made for its libraries.
ENV KEPT_PACKAGES=numpy,torch,torch-npu,triton
LABEL org.opencontainers.image.title="GLM-Image on Triton" \
    org.opencontainers.image.description="GLM-Image, a prompt to a picture, served by NVIDIA Triton" \
    org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 8000 8001 8002
# Loading the full checkpoint takes minutes.
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"]
ENTRYPOINT ["/opt/glm-image/containers/serve", "--checkpoint", "/checkpoint", "--host", "0.0.0.0"]

FROM base AS cuda
RUN --mount=type=cache,target=/tmp/.cache/pip containers/install
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED"
USER 10001:10001

# CANN is copied into Triton's image, not vice versa: CANN's libraries are built for older systems and run on this one,
# while this Triton needs a newer C library and another Python than CANN's images have.
FROM base AS ascend
COPY --from=cann /usr/local/Ascend /usr/local/Ascend
RUN --mount=type=cache,target=/tmp/.cache/pip containers/install npu
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED"
USER 10001:10001

FROM base AS cpu
RUN --mount=type=cache,target=/tmp/.cache/pip containers/install
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.created="$CREATED"
USER 10001:10001
