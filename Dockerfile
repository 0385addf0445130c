# The server in a container: target `cpu` (what is built if none is named) and target `gpu`.
#   docker build --tag peregrine:cpu .
#   docker build --tag peregrine:gpu --target gpu .
#   docker run --publish 127.0.0.1:8000:8000 --volume peregrine:/cache peregrine:cpu
# It needs no capability and no root file system that can be written: --cap-drop ALL --read-only --tmpfs /tmp
# docker stop waits for 10 s unless --stop-timeout says more: server.drain_delay (5 s) and what running requests take.
ARG CPU_BASE=debian:12.12-slim
ARG GPU_BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# tini is the first process: it passes signals on, from the first millisecond, and buries what its children leave.
FROM ${CPU_BASE} AS cpu-system
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# gcc and Python's headers: Triton compiles its launchers at run time
FROM ${GPU_BASE} AS gpu-system
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev python3 python3-dev tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# What seldom changes comes first: a change of the source does not install the dependencies again.
FROM cpu-system AS cpu-build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
WORKDIR /opt/peregrine
ENV PATH=/opt/peregrine/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv .venv \
 && { pip install --no-deps --retries 1 --timeout 15 --constraint constraints.txt --index-url "${CPU_INDEX}" torch \
   || echo "the index of CPU builds is out of reach: taking the default index"; } \
 && pip install --constraint constraints.txt ".[tracing]" tabulate \
 && cd .venv/lib/python3*/site-packages/torch && rm -rf test include \
 && find bin -mindepth 1 ! -name torch_shm_manager -delete
COPY server server
COPY engine engine
COPY kernels kernels
COPY loadtest loadtest
RUN pip install --no-deps --force-reinstall .

FROM gpu-system AS gpu-build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv
WORKDIR /opt/peregrine
ENV PATH=/opt/peregrine/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv .venv \
 && pip install --constraint constraints.txt ".[gpu,tracing]" tabulate \
 && cd .venv/lib/python3*/site-packages/torch && rm -rf test include \
 && find bin -mindepth 1 ! -name torch_shm_manager -delete
COPY server server
COPY engine engine
COPY kernels kernels
COPY loadtest loadtest
RUN pip install --no-deps --force-reinstall .

FROM gpu-system AS gpu
RUN groupadd --gid 10001 peregrine \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin peregrine \
 && install --directory --owner 10001 --group 10001 /cache
COPY --from=gpu-build /opt/peregrine/.venv /opt/peregrine/.venv
COPY configs /opt/peregrine/configs
WORKDIR /opt/peregrine
ENV PATH=/opt/peregrine/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEREGRINE_CONFIG=/opt/peregrine/configs/production.yaml \
    PEREGRINE_CACHE=/cache/peregrine \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_STATE_HOME=/cache/state
USER 10001:10001
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# /livez, not /readyz: who is unhealthy gets replaced, and a server whose engine restarts goes on by itself
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python3", "-m", "server.cli.health"]
ENTRYPOINT ["tini", "--", "peregrine"]
CMD ["serve"]

FROM cpu-system AS cpu
RUN groupadd --gid 10001 peregrine \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin peregrine \
 && install --directory --owner 10001 --group 10001 /cache
COPY --from=cpu-build /opt/peregrine/.venv /opt/peregrine/.venv
COPY configs /opt/peregrine/configs
WORKDIR /opt/peregrine
ENV PATH=/opt/peregrine/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEREGRINE_CONFIG=/opt/peregrine/configs/production.yaml \
    PEREGRINE_CACHE=/cache/peregrine \
    HF_HOME=/cache/huggingface \
    XDG_STATE_HOME=/cache/state
USER 10001:10001
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python3", "-m", "server.cli.health"]
ENTRYPOINT ["tini", "--", "peregrine"]
CMD ["serve"]
