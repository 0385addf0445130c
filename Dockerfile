# The server for an NVIDIA GPU:
#   docker build --tag peregrine .
#   docker run --gpus all --publish 8000:8000 --volume peregrine:/cache peregrine serve MODEL --host 0.0.0.0
# For a CPU, with torch's CPU build where its index can be reached:
#   docker build --tag peregrine-cpu --build-arg BASE=ubuntu:24.04 --build-arg EXTRAS= .
ARG BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
FROM ${BASE}

# gcc and Python's headers: Triton compiles its launchers at run time
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev libgomp1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# Who runs it owns the cache and nothing else. The base image may have taken the first user id.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin peregrine \
 && mkdir /cache \
 && chown peregrine:peregrine /cache

WORKDIR /opt/peregrine
ENV PATH=/opt/peregrine/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEREGRINE_CACHE=/cache/peregrine \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton

# What seldom changes comes first: a change of the source does not install the dependencies again.
ARG EXTRAS=gpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv .venv \
 && { [ -n "${EXTRAS}" ] \
   || pip install --no-cache-dir --disable-pip-version-check --no-deps --constraint constraints.txt --index-url "${CPU_INDEX}" torch \
   || echo "the index of CPU builds is out of reach: taking the default index"; } \
 && pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"
COPY server server
COPY engine engine
COPY kernels kernels
COPY loadtest loadtest
COPY configs configs
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall .

USER peregrine
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# /livez, not /readyz: who is unhealthy gets replaced, and a server whose engine restarts goes on by itself
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["peregrine"]
CMD ["serve", "--host", "0.0.0.0"]
