"""transformers.js, in node and Chromium, loads the ONNX export from the local Hub server and writes the text of the model."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from page_browser import EXECUTABLE, chromium

from minigpt_hf.export.onnx import export_onnx
from tests.neighbours.conftest import CACHE

NPM = CACHE / "npm"  # created by `make neighbours`
TOKENS = 40  # the longest prompt and its continuation exceed the window of 65 tokens
pytestmark = pytest.mark.skipif(
    not (NPM / "node_modules" / "@huggingface" / "transformers").is_dir(), reason="transformers.js is not installed"
)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    return export_onnx(trained, tmp_path_factory.mktemp("onnx") / "tiny")


def put(exported: Path, hub) -> None:
    files = [file for file in exported.rglob("*") if file.is_file()]
    hub.put("user/tiny", {file.relative_to(exported).as_posix(): file.read_bytes() for file in files})


def continuations(exported: Path, hub, dtype: str, prompts: list[str], place: Path) -> list[str]:
    put(exported, hub)
    shutil.copy(Path(__file__).with_name("generate.mjs"), NPM)  # imports are resolved from the folder of the script
    argv = ["node", "generate.mjs", hub.endpoint, "user/tiny", dtype, str(TOKENS), place / "cache"]
    done = subprocess.run(argv, cwd=NPM, input=json.dumps(prompts), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_greedy_texts_of_twenty_prompts_are_equal_in_float32(exported, hub, model, tokenizer, prompts, tmp_path):
    prompts = [*prompts[:19], "".join(prompts)[:120]]
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert max(lengths) + TOKENS > model.config.sliding_window > min(lengths)
    assert continuations(exported, hub, "fp32", prompts, tmp_path) == [
        greedy(model, tokenizer, text) for text in prompts
    ]


# -- in a browser -----------------------------------------------------------------------------------------------------

# Greedy continuations, as in generate.mjs. onnxruntime-web loads its WebAssembly from a public server by default.
IN_BROWSER = """
async ([host, model, dtype, tokens, prompts]) => {
  const { env, pipeline } = await import("/@huggingface/transformers/dist/transformers.min.js");
  env.remoteHost = host;
  env.allowLocalModels = false;
  env.useBrowserCache = false;
  env.backends.onnx.wasm.wasmPaths = new URL("/onnxruntime-web/dist/", location.href).href;
  const generator = await pipeline("text-generation", model, { dtype, device: "wasm" });
  const options = { max_new_tokens: tokens, do_sample: false, return_full_text: false };
  const texts = [];
  for (const prompt of prompts) texts.push((await generator(prompt, options))[0].generated_text);
  return texts;
}
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the installed packages."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *args) -> None:
        """Do not log."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback, and yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed")
def test_greedy_texts_in_chromium_are_equal_in_float32_without_external_requests(
    exported, hub, model, tokenizer, prompts
):
    """WebAssembly of onnxruntime-web; the model comes from another origin, as from the Hub."""
    put(exported, hub)
    prompts = [*prompts[:19], "".join(prompts)[:120]]
    with served(NPM / "node_modules") as site, chromium() as browser:
        page = browser.new_context().new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{site}@huggingface/transformers/package.json")  # an origin for the module
        texts = page.evaluate(IN_BROWSER, [hub.endpoint, "user/tiny", "fp32", TOKENS, prompts])
    assert texts == [greedy(model, tokenizer, prompt) for prompt in prompts]
    assert any(urlsplit(url).path.endswith(".wasm") for url in requests)
    assert any(urlsplit(url).path.endswith("/onnx/model.onnx") for url in requests)
    external = [url for url in requests if urlsplit(url).hostname not in ("127.0.0.1", "localhost")]
    assert [url for url in external if not url.startswith(("blob:", "data:"))] == []


# -- smaller precisions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 18), ("q8", 8)])
def test_most_greedy_texts_are_equal_in_smaller_precisions(
    dtype, least, exported, hub, model, tokenizer, prompts, tmp_path, record_property
):
    texts = continuations(exported, hub, dtype, prompts, tmp_path)
    equal = sum(text == greedy(model, tokenizer, prompt) for text, prompt in zip(texts, prompts, strict=True))
    record_property("equal", equal)
    assert equal >= least
