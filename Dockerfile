# The image of scripts/launch/pytorchjob.yaml: the project in its working folder, its pinned dependencies, no root.
#
#   docker build --tag REGISTRY/lip-resnet:latest .
#   docker run --gpus all --shm-size 16g --volume DATA:/data --volume RUNS:/runs REGISTRY/lip-resnet:latest \
#       torchrun --standalone --nproc_per_node=gpu train.py --config configs/imagenet/lip_resnet50_step90.yaml \
#       --output /runs/lip_resnet50_step90 --resume auto data.root=/data/imagenet
#
# CUDA's libraries come with the torch wheel; the host needs the driver and the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm

# g++ compiles the CPU kernel and Triton's launcher on first use; git gives the commit that a run records.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

# The group and user that pytorchjob.yaml names; caches of compiled kernels lie in the home folder.
RUN groupadd --gid 1000 lip && useradd --uid 1000 --gid lip --create-home lip

WORKDIR /workspace/lip-resnet
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt

COPY --chown=lip:lip . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && mkdir /runs && chown -R lip:lip /workspace/lip-resnet /runs

USER lip
ENV PYTHONUNBUFFERED=1
# No entry point: a job's command is torchrun itself, which must be process 1 to get SIGTERM.
CMD ["python", "train.py", "--help"]
