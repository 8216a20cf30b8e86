# Spotjax in a container. ACCELERATOR is cpu, cuda12, cuda13 or tpu:
#   docker build --build-arg ACCELERATOR=cuda13 --tag spotjax:0.1.0-cuda13 .
# How to run it is in docs/clouds.md.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-trixie AS build
ARG ACCELERATOR=cpu
RUN python -m venv /opt/spotjax
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY meshes meshes
COPY models models
COPY spotjax spotjax
COPY tools tools
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/spotjax/bin/pip install --constraint constraints.txt ".[${ACCELERATOR}]"

FROM python:${PYTHON}-slim-trixie
RUN groupadd --gid 10001 spotjax \
    && useradd --uid 10001 --gid 10001 --home-dir /var/cache/spotjax --no-create-home --shell /usr/sbin/nologin spotjax \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/cache/spotjax /var/lib/spotjax
COPY --from=build /opt/spotjax /opt/spotjax
# Drivers of NVIDIA are mounted by whoever runs the container: at /usr/local/nvidia on GKE, by its runtime elsewhere.
ENV PATH=/opt/spotjax/bin:${PATH} \
    HOME=/var/cache/spotjax \
    SPOTJAX_CACHE=/var/cache/spotjax \
    XDG_STATE_HOME=/var/lib/spotjax \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER 10001:10001
WORKDIR /var/lib/spotjax
EXPOSE 8470 8472
# Asks the server, or a worker's controller, that the variables of the container say.
HEALTHCHECK --interval=15s --timeout=10s --start-period=2m CMD ["spotjax", "health"]
ENTRYPOINT ["spotjax"]
CMD ["serve"]
