# Yangtuo in a container: each step is one of the project's own scripts, which tests/test_docker.py runs in a fresh folder.
#
#   docker build -t yangtuo .                                                 # for NVIDIA GPUs
#   docker build -t yangtuo --build-arg BASE=ubuntu:24.04 --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .   # for CPUs
#   docker run --rm --gpus all -v "$PWD/output:/yangtuo/output" yangtuo       # the quickstart; on a CPU without --gpus all
#   docker run --rm --gpus all -v "$PWD/output:/yangtuo/output" -v "$PWD/my:/my" yangtuo scripts/finetune_lora.sh --model_name_or_path /my/llama --data_path /my/data.json
#   docker run --rm --gpus all -v "$PWD/output:/yangtuo/output" -p 7860:7860 yangtuo scripts/webui.sh --server_name 0.0.0.0 --auth user:password
#
# The driver comes from the host (NVIDIA Container Toolkit), torch with its CUDA libraries from pip; nvcc of the same major version is for
# DeepSpeed, which compiles its optimizers when they are first used. GPUs before Turing (V100) need wheels and a base of CUDA 12.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv python3-dev g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /yangtuo
ENV PATH=/yangtuo/.venv/bin:$PATH YANGTUO_CACHE=/yangtuo/.cache PIP_NO_CACHE_DIR=1

# What changes seldom comes first: an edited script builds a new image without installing anything again
ARG PIP_EXTRA_INDEX_URL
COPY requirements*.txt ./
COPY scripts/install.sh scripts/
RUN source scripts/install.sh requirements.txt
COPY . .
RUN python scripts/default_model.py

ENTRYPOINT ["bash"]
CMD ["scripts/quickstart.sh"]
