"""Test a model folder, as remote code and as native twin, with other releases of transformers, each in its own environment.

    python scripts/compat.py 5.17.0 5.23.0

A small model folder, its native twin (what `minigpt push` writes to `main`) and reference outputs are saved with the current
environment. `scripts/load_elsewhere.py` then loads both in the other environment, without this package and with empty caches,
through every Auto class, and compares logits (bit-identical) and the tokens of six generation strategies. An environment is
created once, in `.compat/`, with the versions of `constraints.txt`, except for those that the release of transformers
determines.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
from minigpt_hf.data.tokenizer import character_tokenizer
from minigpt_hf.export.native import export_native
from minigpt_hf.publish.model_folder import save_model_files

ROOT = Path(__file__).resolve().parents[1]
UNPINNED = ("transformers==", "huggingface_hub==")
GREEDY = {"max_new_tokens": 20, "do_sample": False}
STRATEGIES = {
    "greedy": GREEDY,
    "no cache": {**GREEDY, "use_cache": False},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "beam search": {**GREEDY, "num_beams": 3},
    "prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 3},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.3},
}


def environment(version: str) -> Path:
    """Create a virtual environment with a release of transformers and this project's torch, if it does not exist yet.

    Returns:
        The path of its Python interpreter.
    """
    folder = ROOT / ".compat" / version
    marker = folder / "installed"
    if not marker.exists():
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder.with_name(f"constraints-{version}.txt")
        folder.parent.mkdir(exist_ok=True)
        constraints.write_text("\n".join(pin for pin in pins if not pin.startswith(UNPINNED)))
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = [f"transformers=={version}", "torch", "jinja2"]
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, *packages]
        subprocess.run(pip, check=True)
        marker.touch()
    return folder / "bin" / "python"


def save_reference(folder: Path) -> None:
    """Save a model with one full and one sliding attention layer to `model/`, its native twin to `native/`, and its
    outputs to `expected.pt`."""
    tokenizer = character_tokenizer(["abcdefgh\n"])
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MiniGPTForCausalLM(config).eval()
    save_model_files(model, tokenizer, folder / "model")
    export_native(folder / "model", folder / "native")
    ids = torch.randint(0, len(tokenizer) - 2, (1, 12))
    expected = {
        "ids": ids,
        "logits": model(ids).logits.detach(),
        "inv_freq": model.model.rotary_emb.inv_freq,
        "generated": [(name, options, model.generate(ids, **options)) for name, options in STRATEGIES.items()],
        "tokens": tokenizer("ab").input_ids,
    }
    torch.save(expected, folder / "expected.pt")


def run_load_elsewhere(python: Path | str, folder: Path) -> subprocess.CompletedProcess:
    """Run `load_elsewhere.py` on a folder written by `save_reference`, with empty caches."""
    argv = [
        python,
        ROOT / "scripts" / "load_elsewhere.py",
        folder / "model",
        folder / "native",
        folder / "saved",
        folder / "expected.pt",
    ]
    caches = {"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(argv, cwd=folder, env={**os.environ, **caches}, capture_output=True, text=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Test a model folder with other releases of transformers.")
    parser.add_argument("versions", nargs="+", help="releases of transformers, for example 5.17.0")
    failures = 0
    for version in parser.parse_args(argv).versions:
        with tempfile.TemporaryDirectory() as folder:
            save_reference(Path(folder))
            process = run_load_elsewhere(environment(version), Path(folder))
        failures += process.returncode != 0
        print(process.stdout.strip() or f"transformers {version}: {process.stderr}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
