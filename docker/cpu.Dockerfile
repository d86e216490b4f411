# Segmentation on a CPU: no PyTorch, no GPU.  From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t hpddrnet-trt .
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /source
ARG EXTRAS=openvino,results
RUN python3 -m venv /opt/hpddrnet && \
    /opt/hpddrnet/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[${EXTRAS}]"

FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 hpddrnet
COPY --from=build /opt/hpddrnet /opt/hpddrnet
ENV PATH=/opt/hpddrnet/bin:${PATH} HPDDRNET_CACHE=/tmp/hpddrnet-cache
USER hpddrnet
WORKDIR /data
ENTRYPOINT ["hpddrnet-trt"]
CMD ["--help"]
