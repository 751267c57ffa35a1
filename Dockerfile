# An image for `fora-trt serve` on NVIDIA GPUs, without a model: docs/production.md says how to build and start it.
# CUDA 13 is that of the torch in constraints.txt.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# Versions of the system's packages are those of the image's release of Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/fora-trt \
    && useradd --create-home --uid 10001 fora \
    && install --directory --owner fora --group fora /data
ENV PATH=/opt/fora-trt/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /opt/source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fora_trt fora_trt
# For models with prompts: --build-arg EXTRAS=gpu,serve,text
ARG EXTRAS=gpu,serve
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

# Bundles, plans and downloads: export/, engines/ and huggingface/ in this folder.
ENV HF_HOME=/data/huggingface
USER 10001
WORKDIR /data
EXPOSE 8000
# Of `serve` at its default port. Until a model is ready, which takes minutes if plans are built, failures do not count.
HEALTHCHECK --start-period=60m --interval=10s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["fora-trt"]
CMD ["--help"]
