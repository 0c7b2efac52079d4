# minigpt on CPU. The current folder of the host is the working directory:
#
#     docker build --build-arg PIP_EXTRA_INDEX_URL=URL --tag minigpt .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" minigpt train --data notes.txt
FROM python:3.12-slim-bookworm

# URL: PyTorch's index of CPU builds. Without it, the default build is installed, which contains CUDA and is ten times as large.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir torch==2.13.0

COPY constraints.txt pyproject.toml README.md LICENSE model_card.md minigpt_cli.py /src/
COPY minigpt_hf /src/minigpt_hf
# Caches are in a folder that every user can write to; torch and datasets require a home.
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[fast,lora,export,score]" \
    && mkdir --mode=1777 /cache
ENV HOME=/cache HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib

USER 1000:1000
WORKDIR /work
ENTRYPOINT ["minigpt"]
CMD ["--help"]
