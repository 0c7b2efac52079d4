"""Generate greedily with vLLM; run by the Python interpreter of a separate environment.

Reads prompts as lists of token ids, or with --chat as questions, and saves the generated ids, the model class and the number
of workers.

    python vllm_writes.py FOLDER PROMPTS.json OUT.json --tokens N [--chat] [--tensor_parallel_size N] [--trust_remote_code]
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args()
    engine = LLM(
        arguments.folder,
        trust_remote_code=arguments.trust_remote_code,
        tensor_parallel_size=arguments.tensor_parallel_size,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
    )
    prompts, sampling = (
        json.loads(arguments.prompts.read_text()),
        SamplingParams(temperature=0, max_tokens=arguments.tokens),
    )
    if arguments.chat:
        outputs = engine.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
    else:
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    model = engine.llm_engine.vllm_config.model_config
    model_class, _ = model.registry.resolve_model_cls(model.architectures, model_config=model)
    results = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "class": model_class.__name__,
        "workers": len(engine.collective_rpc("check_health")),
    }
    arguments.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
