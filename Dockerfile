# The companion in a container: JupyterLab on port 8888, and every command of the README.
#   docker build -t mculora .
#   docker run --rm -p 8888:8888 -v "$PWD/data:/home/mculora/mculora/data" mculora
# PyPI's PyTorch for Linux brings CUDA along. For the CPU build, a tenth of the size, name the index
# that pytorch.org/get-started gives for it: docker build --build-arg TORCH_INDEX=... -t mculora .
FROM python:3.11-slim-bookworm

# whatever versions of these two Debian has
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*

# The names are Binder's: it builds this file, too.
ARG NB_USER=mculora
ARG NB_UID=1000
RUN useradd --create-home --uid ${NB_UID} ${NB_USER}
USER ${NB_USER}
WORKDIR /home/${NB_USER}
RUN mkdir mculora
WORKDIR /home/${NB_USER}/mculora

COPY --chown=${NB_UID} . .
ARG TORCH_INDEX=
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" make setup && rm -rf "${HOME}/.cache"
ENV PATH="/home/${NB_USER}/mculora/.venv/bin:${PATH}" HOME="/home/${NB_USER}"

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=nbs"]
