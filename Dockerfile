# flashcore in a container: built with the CUDA toolkit, run on the small CUDA base image.
#
#   docker build -t flashcore .
#   docker run --rm --gpus all flashcore            # the demo; without --gpus it runs on the CPU
#   docker run --rm --gpus all flashcore info
ARG CUDA=13.0.2
ARG SYSTEM=ubuntu24.04

FROM nvidia/cuda:${CUDA}-devel-${SYSTEM} AS build
ARG ARCHS=""
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /flashcore
COPY . .
RUN python3 -m venv /opt/flashcore \
 && CMAKE_ARGS="-DFLASHCORE_CUDA=ON ${ARCHS:+-DFLASHCORE_ARCHS=${ARCHS}}" \
    /opt/flashcore/bin/python -m pip install --no-cache-dir .

# The CUDA runtime is linked in and the driver comes from the host: the base image has all that is needed.
FROM nvidia/cuda:${CUDA}-base-${SYSTEM} AS run
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 libstdc++6 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/flashcore /opt/flashcore
ENV PATH=/opt/flashcore/bin:$PATH
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["python", "-m", "flashcore"]
CMD ["demo"]
