# The image of every pod: trainer, server, and what submits to them.
#
#     docker build -t grstream:0.1.0 .
#     docker build -t grstream:0.1.0-cuda --build-arg VARIANT=cuda .
FROM python:3.11.14-slim-bookworm

# cpu, or cuda: PyPI's torch for Linux, which brings CUDA's libraries; the driver is the node's.
ARG VARIANT=cpu

# KubeRay starts pods with bash, and asks with wget whether they are well. Triton compiles its launchers with gcc.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash wget ca-certificates \
        $([ "$VARIANT" = cuda ] && echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/*

# Into the system's Python: KubeRay starts `bash -l`, whose profile sets PATH anew and would lose a virtual
# environment.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /app

# What changes seldom comes first: torch, the other dependencies, the code.
COPY constraints.txt pyproject.toml ./
RUN case "$VARIANT" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=https://pypi.org/simple ;; \
        *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && pip install --no-deps --index-url "$index" --constraint constraints.txt torch
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = p['optional-dependencies']; \
print(*p['dependencies'], *extras['ann'], *extras['client'], *extras['grpc'], *extras['plots'], *extras['traces'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY LICENSE ./
COPY configs configs
COPY kernels kernels
COPY grstream grstream
COPY serve serve
COPY jobs jobs
RUN python -m compileall -q kernels grstream serve jobs \
    && printf '#!/bin/sh\nexec python -m grstream.cli "$@"\n' > /usr/local/bin/grstream \
    && chmod +x /usr/local/bin/grstream \
    && useradd --uid 1000 --create-home grstream \
    && install -d -o grstream -g grstream /data

# `kernels` and `serve` are names of other distributions, too: the project's come first.
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

USER 1000:1000
CMD ["bash"]
