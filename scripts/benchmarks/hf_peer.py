"""Train GPT-2 or Llama from scratch as transformers' `run_clm.py` does: fixed sequences, AdamW, the stock Trainer.

    python scripts/benchmarks/hf_peer.py gpt2 tuned --data tinyshakespeare.txt --output_dir runs/gpt2

The model has the size of the recipe `shakespeare-char`; the settings are the defaults (`stock`) or `tuned`. Saves a
model folder and prints the training time as a line of JSON. Started by `benchmark.py learn --peer hf`.
"""

import argparse
import json
from itertools import chain

from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.tokenizer import character_tokenizer

BLOCK_SIZE, BATCH, WIDTH, LAYERS, HEADS = 64, 12, 128, 4, 4
# Stock: the defaults of `TrainingArguments` and of the configurations. Tuned: the best of a search over learning rate,
# weight decay and beta2 (docs/log.md).
TUNED = {
    "gpt2": {"learning_rate": 4e-3, "weight_decay": 0.1, "adam_beta2": 0.99, "warmup_steps": 100},
    "llama": {"learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.99, "warmup_steps": 100},
}


def make_model(architecture: str, settings: str, vocab_size: int) -> PreTrainedModel:
    """Create a model of the hidden size, depth and, within 2 %, the number of parameters of `shakespeare-char`."""
    if architecture == "gpt2":
        dropout = {} if settings == "stock" else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=BLOCK_SIZE,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=0,
            eos_token_id=0,
            **dropout,
        )
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=BLOCK_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=344,  # 8/3 · 128 = 341.3, rounded up to a multiple of 8
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train and save the model, and print the training time."""
    parser = argparse.ArgumentParser(description="Train GPT-2 or Llama as run_clm.py does.")
    parser.add_argument("architecture", choices=["gpt2", "llama"])
    parser.add_argument("settings", choices=["stock", "tuned"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="overrides of TrainingArguments, as JSON")
    args = parser.parse_args()

    set_seed(args.seed)
    corpus = load_corpus(args.data)
    tokenizer = character_tokenizer(text for split in (corpus.train, corpus.validation) for text in split)
    texts = Dataset.from_dict({"text": list(corpus.train)})
    tokens = texts.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])
    sequences = tokens.map(group_texts, batched=True)
    model = make_model(args.architecture, args.settings, len(tokenizer))
    training = {"max_steps": args.max_steps, "per_device_train_batch_size": BATCH, "seed": args.seed, "use_cpu": True}
    training |= {"save_strategy": "no", "logging_steps": 100, "output_dir": args.output_dir}
    training |= (TUNED[args.architecture] if args.settings == "tuned" else {}) | args.set
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training),
        train_dataset=sequences,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    seconds = trainer.train().metrics["train_runtime"]
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(json.dumps({"seconds": seconds}))


def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Concatenate all texts and split them into sequences; the labels equal the inputs and are shifted in the model."""
    concatenated = {name: list(chain.from_iterable(lists)) for name, lists in rows.items()}
    total = len(concatenated["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
    sequences = {
        name: [values[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for name, values in concatenated.items()
    }
    return {**sequences, "labels": [list(sequence) for sequence in sequences["input_ids"]]}


if __name__ == "__main__":
    main()
