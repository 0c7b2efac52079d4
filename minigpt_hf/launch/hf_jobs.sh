#!/bin/bash
# Eight GPUs of Hugging Face Jobs; the model is pushed to the Hub.
#
#     bash hf_jobs.sh --recipe gpt2-124m --data https://HOST/fineweb --bf16 true --hub_model_id USER/NAME
#
# The arguments are those of `minigpt train`. A job has no local files: `--data` is the URL of a prepared text (`minigpt
# tokenize --merge`) or a Hub dataset. The disk of a job is deleted at its end, so every checkpoint is uploaded as a
# complete model.
# Parsed by `hf jobs run --dry-run` of huggingface_hub 2.4, not run.
exec hf jobs run --flavor a100x8 --timeout 24h --secrets HF_TOKEN ghcr.io/astral-sh/uv:python3.12-bookworm \
    uvx --from torch --with 'minigpt-hf[fast]>=0.2' \
    torchrun --standalone --nproc_per_node 8 -m minigpt_cli train "$@" --push_to_hub
