# Engines on an NVIDIA GPU: TensorRT from its wheels on NVIDIA's CUDA base, whose only part used is what lets the
# container toolkit bring in the host's driver.  From the repository's root:
#   docker build -f docker/nvidia.Dockerfile -t hpddrnet-trt:nvidia .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /source
# tensorrt builds and runs; tensorrt-lean only runs engines built with --version-compatible, and is 2 GB smaller.
ARG EXTRAS=tensorrt,results
RUN python3 -m venv /opt/hpddrnet && \
    /opt/hpddrnet/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[${EXTRAS}]" && \
    rm -rf /source && useradd --create-home hpddrnet
ENV PATH=/opt/hpddrnet/bin:${PATH} HPDDRNET_CACHE=/tmp/hpddrnet-cache
USER hpddrnet
WORKDIR /data
ENTRYPOINT ["hpddrnet-trt"]
CMD ["engines"]
