# fastmoco for NVIDIA GPUs with a driver for CUDA 13. From the root of the source folder:
#
#   docker build -t fastmoco .
#   docker run --rm --gpus all --shm-size=8g -v "$PWD":/work fastmoco doctor
#
# torch and DALI bring the libraries of CUDA along, so the base image has the driver's interface alone.
# A machine with a CUDA 12 driver: see docs/install.md.

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS system
# Triton compiles a launcher for each kernel: it needs gcc and the headers of Python. No versions: Ubuntu
# removes old ones from its servers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
COPY . /source
RUN python3 -m venv /build \
    && FASTMOCO_PURE=0 /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM system
# The large packages, in a layer that changes only with their versions; then fastmoco and the rest.
COPY constraints.txt /opt/constraints.txt
RUN python3 -m venv /opt/fastmoco \
    && /opt/fastmoco/bin/pip install --no-cache-dir -c /opt/constraints.txt torch nvidia-dali-cuda130
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    wheel="$(ls /wheels/fastmoco-*.whl)" \
    && /opt/fastmoco/bin/pip install --no-cache-dir -c /opt/constraints.txt \
        "${wheel}[cuda13,data,logging]"
# Triton and fastmoco keep caches in the home folder. Every user may write there, because the option
# `user` of docker gives numbers without a home.
RUN useradd --create-home --uid 10001 fastmoco \
    && chmod 1777 /home/fastmoco \
    && install -d -o fastmoco -g fastmoco /work
ENV PATH=/opt/fastmoco/bin:$PATH HOME=/home/fastmoco
USER 10001
WORKDIR /work
ENTRYPOINT ["fastmoco"]
CMD ["doctor"]
