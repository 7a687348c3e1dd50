# gipip on a CPU: docker build --tag gipip . && docker run --rm -p 8888:8888 gipip
# PyTorch's default wheels carry CUDA, several gigabytes that a CPU does not need. With the address
# of PyTorch's index of CPU wheels (pytorch.org, "Get started") the image stays small:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=ADDRESS --tag gipip .
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /gipip gipip

WORKDIR /gipip
COPY --chown=gipip . .
USER gipip
RUN PIP_NO_CACHE_DIR=1 make install

EXPOSE 8888
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks/00_quickstart.ipynb"]
