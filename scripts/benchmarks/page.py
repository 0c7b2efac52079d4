"""Generation speed of the exported HTML page in headless Chromium, at the sizes of two recipes.

The weights are random, as the speed does not depend on them. Each page is opened in a new browser by its path, as with a
double click. `ready` is the time from opening the page until the model can generate. Tokens/s are those of the worker, which
uses one core; those per second of processor time, which includes drawing the page, depend less on other load.
"""

import argparse
import statistics
import string
import tempfile
from pathlib import Path
from typing import Any

WINDOW = {"use_sliding_window": True}
SHAPES = {
    "shakespeare-char": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "sliding_window": 65},
    "shakespeare-char-gpu": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "sliding_window": 257,
    },
}
TINY = {"tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 17}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--tokens", type=int, default=400, help="number of new tokens (default: 400)")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test this command")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens/s and the time until the page is ready."""
    from page_browser import chromium

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pages = {name: export(shape, Path(folder) / name) for name, shape in (TINY if args.tiny else SHAPES).items()}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
        for _ in range(args.repeats):
            for name, (file, _) in pages.items():
                with chromium() as browser:
                    rounds[name].append(measure(browser, file, args.tokens))
        for name, (file, parameters) in pages.items():
            median = {key: statistics.median(each[key] for each in rounds[name]) for key in rounds[name][0]}
            rows.append(
                {
                    "model": name,
                    "parameters": f"{parameters / 1e6:.1f} M",
                    "file": f"{file.stat().st_size / 1e6:.1f} MB",
                    "ready": f"{median['ready']:.2f} s",
                    "tokens/s": f"{median['speed']:,.0f}",
                    "tokens/s of processor time": f"{median['processor_speed']:,.0f}",
                }
            )
    return {"task": f"{args.tokens} new tokens at temperature 1, WebAssembly, one core", "page": rows}


def export(shape: dict[str, int], folder: Path) -> tuple[Path, int]:
    """Export a model with random weights; return the page and the number of parameters."""
    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
    from minigpt_hf.data.tokenizer import character_tokenizer
    from minigpt_hf.export.html import export_html
    from minigpt_hf.publish.model_folder import save_model_files

    tokenizer = character_tokenizer([string.ascii_letters + string.digits + " .,"])
    config = MiniGPTConfig(**shape, **WINDOW, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model = MiniGPTForCausalLM(config).eval()
    save_model_files(model, tokenizer, folder / "model")
    (page,) = export_html(folder / "model", folder / "page", "float16").iterdir()
    return page, model.num_parameters()


def measure(browser: Any, file: Path, tokens: int) -> dict[str, float]:
    """Open the page and generate."""
    from page_browser import READY

    page = browser.new_page()
    page.goto(file.resolve().as_uri())
    page.wait_for_selector(READY, timeout=60_000)
    ready = page.evaluate("performance.now()")
    session = browser.new_browser_cdp_session()

    def processor_seconds() -> float:
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        return sum(process["cpuTime"] for process in processes if process["type"] == "renderer")

    before = processor_seconds()
    options = {"ids": [5], "options": {"maxNewTokens": tokens, "stop": []}}
    result = page.evaluate("(message) => engine.run('generate', message)", options)
    speed = tokens / (processor_seconds() - before or 1e-3)
    return {"ready": ready / 1000, "speed": result["tokensPerSecond"], "processor_speed": speed}
