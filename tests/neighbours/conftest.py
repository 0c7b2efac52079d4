"""Integration tests with third-party programs, which run on a model folder trained by `minigpt train`.

`make neighbours` creates their environments (from `requirements*.txt` here) and runs this folder; `make test` does not.
"""

import email
import shutil
import zlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli import main
from tests.conftest import ROOT

CACHE = ROOT / ".neighbours"  # environments and the trained model
EMAIL = Path(email.__file__).parent  # a package of the standard library, as text that every machine has
# 4 layers, hidden size 128; 300 steps of 12 · 64 = 768 tokens: 230,400 tokens.
RECIPE = f"""
data: {EMAIL}
tokenizer: bpe
vocab_size: 512
block_size: 64
use_sliding_window: true
hidden_size: 128
num_hidden_layers: 4
num_attention_heads: 4
num_key_value_heads: 2
per_device_train_batch_size: 12
max_steps: 300
learning_rate: 4.0e-3
warmup_steps: 20
logging_steps: 50
validation_characters: 20000
sample_tokens: 10
sample_prompt: "def "
use_cpu: true
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def trained() -> Path:
    """A model folder, trained once for a recipe and a card; its model code is replaced by the current one."""
    card = (ROOT / "model_card.md").read_text(encoding="utf-8")
    run = CACHE / f"run-{zlib.crc32((RECIPE + card).encode()):08x}"
    if not (run / "model").is_dir():
        CACHE.mkdir(exist_ok=True)
        (CACHE / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        assert main(["train", "--recipe", str(CACHE / "recipe.yaml"), "--output_dir", str(run)]) == 0
    for file in (ROOT / "minigpt_hf" / "model").glob("*_minigpt.py"):
        shutil.copy(file, run / "model")
    return run / "model"


@pytest.fixture(scope="session")
def tokenizer(trained) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(trained)


@pytest.fixture
def model(trained) -> MiniGPTForCausalLM:
    return MiniGPTForCausalLM.from_pretrained(trained).eval()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Twenty prefixes of lines of the training text, of different lengths."""
    lines = (EMAIL / "message.py").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if len(line) > 30]
    return [line[: 8 + index] for index, line in enumerate(lines[:: len(lines) // 20][:20])]
