# The gateway's image. Needs BuildKit (docker build, buildah and podman have it).
#
#   docker build -t tidegate .                          CPU (the default target)
#   docker build --target cuda -t tidegate:cuda .       NVIDIA GPUs, x86-64 only
#
# What runs has no shell, no package manager and no root: a numeric user, nothing to write but /var/lib/tidegate,
# and the licences of what is inside under /usr/share/doc. docs/deploy.md explains how to run it.
#
# Base images are pinned by tag, because a digest that nobody here has pulled would be a guess. Pin what you have
# checked: docker build --build-arg RUNTIME_IMAGE=gcr.io/distroless/cc-debian12@sha256:... .

ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG PYTHON_IMAGE=python:3.13-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

# The program. Both build images are Debian 12, so that the C library is no newer than where it runs.
FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
# The manifest names the benchmarks, and cargo refuses it where they are not.
COPY benches ./benches
COPY proto ./proto
COPY src ./src
COPY scripts/collect-licences.sh /usr/local/bin/
# Downloads and compiled crates stay between builds in cache mounts, so the program is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --profile dist --locked --bin tidegate \
    && install -D -m 0755 target/dist/tidegate /out/tidegate \
    && install -d -m 0700 /out/state \
    && collect-licences.sh /out/THIRD-PARTY-NOTICES.txt

# ONNX Runtime, by pinned version and SHA-256. The script goes on without it where it cannot be had; an image does not.
FROM ${PYTHON_IMAGE} AS onnxruntime-cpu
COPY scripts/fetch-onnxruntime.sh /usr/local/bin/
RUN fetch-onnxruntime.sh /opt/onnxruntime \
    && test -s /opt/onnxruntime/lib/libonnxruntime.so

FROM ${PYTHON_IMAGE} AS onnxruntime-cuda
COPY scripts/fetch-onnxruntime.sh /usr/local/bin/
RUN fetch-onnxruntime.sh --gpu /opt/onnxruntime \
    && test -s /opt/onnxruntime/lib/libonnxruntime_providers_cuda.so

# With CUDA 13 and cuDNN 9, which ONNX Runtime's GPU build asks for. Ubuntu underneath: NVIDIA ships no smaller one.
FROM ${CUDA_IMAGE} AS cuda
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tidegate" \
      org.opencontainers.image.description="Model-serving gateway for ONNX models: Open Inference Protocol v2 over HTTP and gRPC (CUDA)" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/tidegate /usr/local/bin/tidegate
COPY --from=build --chown=65532:65532 /out/state /var/lib/tidegate
COPY --from=onnxruntime-cuda /opt/onnxruntime/lib /usr/local/lib/onnxruntime
COPY --from=onnxruntime-cuda /opt/onnxruntime/LICENSE /opt/onnxruntime/ThirdPartyNotices.txt /usr/share/doc/onnxruntime/
COPY --from=build /out/THIRD-PARTY-NOTICES.txt /usr/share/doc/tidegate/
COPY LICENSE /usr/share/doc/tidegate/
ENV ORT_DYLIB_PATH=/usr/local/lib/onnxruntime/libonnxruntime.so \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TIDEGATE_SERVER_HTTP_ADDRESS=0.0.0.0:8000 \
    TIDEGATE_SERVER_GRPC_ADDRESS=0.0.0.0:8001 \
    TIDEGATE_SERVER_METRICS_ADDRESS=0.0.0.0:8002 \
    TIDEGATE_SERVER_STATE_DIR=/var/lib/tidegate \
    TIDEGATE_REPOSITORY_PATH=/models
WORKDIR /
USER 65532:65532
VOLUME ["/var/lib/tidegate"]
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["/usr/local/bin/tidegate", "health"]
ENTRYPOINT ["/usr/local/bin/tidegate"]
CMD ["serve"]

# The default: the C and C++ runtime libraries and nothing else.
FROM ${RUNTIME_IMAGE} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tidegate" \
      org.opencontainers.image.description="Model-serving gateway for ONNX models: Open Inference Protocol v2 over HTTP and gRPC" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/tidegate /usr/local/bin/tidegate
COPY --from=build --chown=65532:65532 /out/state /var/lib/tidegate
COPY --from=onnxruntime-cpu /opt/onnxruntime/lib /usr/local/lib/onnxruntime
COPY --from=onnxruntime-cpu /opt/onnxruntime/LICENSE /opt/onnxruntime/ThirdPartyNotices.txt /usr/share/doc/onnxruntime/
COPY --from=build /out/THIRD-PARTY-NOTICES.txt /usr/share/doc/tidegate/
COPY LICENSE /usr/share/doc/tidegate/
# Everyone who can reach the container can reach these addresses, and this version has no authentication. So the image
# alone refuses to serve: whoever runs it says TIDEGATE_SERVER_ALLOW_UNAUTHENTICATED=true, knowing the network.
ENV ORT_DYLIB_PATH=/usr/local/lib/onnxruntime/libonnxruntime.so \
    TIDEGATE_SERVER_HTTP_ADDRESS=0.0.0.0:8000 \
    TIDEGATE_SERVER_GRPC_ADDRESS=0.0.0.0:8001 \
    TIDEGATE_SERVER_METRICS_ADDRESS=0.0.0.0:8002 \
    TIDEGATE_SERVER_STATE_DIR=/var/lib/tidegate \
    TIDEGATE_REPOSITORY_PATH=/models
WORKDIR /
USER 65532:65532
VOLUME ["/var/lib/tidegate"]
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["/usr/local/bin/tidegate", "health"]
ENTRYPOINT ["/usr/local/bin/tidegate"]
CMD ["serve"]
