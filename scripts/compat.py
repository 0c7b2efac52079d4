"""The folder under other releases of transformers, each in an environment of its own.

    python scripts/compat.py 5.17.0 5.23.0

It writes a small model folder here and loads it there with `scripts/load_elsewhere.py`: no package, an empty cache, every
Auto class, logits bit for bit, and the same tokens in six ways of generating. An environment is made once, under
`.compat/`, from the registry that pip is set to; its pins are those of `constraints.txt`, but for what a release of
transformers chooses by itself.
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
from minigpt_hf.publish.folder import save_suitcase

ROOT = Path(__file__).resolve().parents[1]
CHOSEN_BY_TRANSFORMERS = ("transformers==", "huggingface_hub==")
GREEDY = {"max_new_tokens": 20, "do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "no cache": {**GREEDY, "use_cache": False},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "beams": {**GREEDY, "num_beams": 3},
    "prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 3},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
}


def environment(version: str) -> Path:
    """The Python of an environment with this release of transformers and this project's torch."""
    folder = ROOT / ".compat" / version
    done = folder / "installed"
    if not done.exists():
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        kept = folder.with_name(f"constraints-{version}.txt")
        folder.parent.mkdir(exist_ok=True)
        kept.write_text("\n".join(pin for pin in pins if not pin.startswith(CHOSEN_BY_TRANSFORMERS)))
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = [f"transformers=={version}", "torch", "jinja2"]
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", kept, *wanted]
        subprocess.run(pip, check=True)
        done.touch()
    return folder / "bin" / "python"


def write(folder: Path) -> None:
    """`model/`, and in `expected.pt` what it computes here: one layer that sees all, one with a window of eight."""
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
    save_suitcase(model, tokenizer, folder / "model")
    ids = torch.randint(0, len(tokenizer) - 2, (1, 12))
    expected = {
        "ids": ids,
        "logits": model(ids).logits.detach(),
        "inv_freq": model.model.rotary_emb.inv_freq,
        "written": [(way, options, model.generate(ids, **options)) for way, options in WAYS.items()],
        "tokens": tokenizer("ab").input_ids,
    }
    torch.save(expected, folder / "expected.pt")


def load(python: Path | str, folder: Path) -> subprocess.CompletedProcess:
    """Run `load_elsewhere.py` on what `write` wrote, with a cache of its own."""
    program = [
        python,
        ROOT / "scripts" / "load_elsewhere.py",
        folder / "model",
        folder / "again",
        folder / "expected.pt",
    ]
    caches = {"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(program, cwd=folder, env={**os.environ, **caches}, capture_output=True, text=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="load a model folder under other releases of transformers")
    parser.add_argument("versions", nargs="+", help="releases of transformers, such as 5.17.0")
    failures = 0
    for version in parser.parse_args(argv).versions:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            done = load(environment(version), Path(folder))
        failures += done.returncode != 0
        print(done.stdout.strip() or f"transformers {version}: {done.stderr}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
