# minigpt on CPU. The current folder of the host is the working directory:
#
#     docker build --tag minigpt .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" minigpt train --data notes.txt
FROM python:3.12-slim-bookworm

# The CPU build of torch; the default build contains CUDA and is ten times as large.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

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
