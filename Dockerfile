# X-Former for training and serving, on a CPU or, with two build arguments, on NVIDIA GPUs; see docs/docker.md.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates default-jre-headless python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 xformer \
    && python3 -m venv /opt/xformer
ENV PATH=/opt/xformer/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# PyTorch first: its index has the build for the hardware, and the layer stays when the package changes.
COPY constraints.txt /build/
RUN pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' /build/constraints.txt)"

COPY pyproject.toml README.md LICENSE /build/
COPY src /build/src
RUN pip install -c /build/constraints.txt '/build[train,eval,serve,gguf,lora]'

USER 10001
WORKDIR /home/xformer

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["xformer"]
CMD ["serve", "--host", "0.0.0.0"]
