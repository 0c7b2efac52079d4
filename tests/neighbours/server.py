"""`transformers serve` in a process that does not import this package."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI


@contextmanager
def serving(folder: Path) -> Iterator[OpenAI]:
    """Serve a model folder, with the code that it contains, and yield a client."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    argv = [Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port), "--device", "cpu"]
    argv += ["--host", "127.0.0.1", *(["--trust-remote-code"] if (folder / "modeling_minigpt.py").is_file() else [])]
    env = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    with (folder.parent / "server.log").open("w") as log:
        server = subprocess.Popen(
            argv, env=env, cwd=folder.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, (folder.parent / "server.log").read_text()
            try:
                with urlopen(f"http://127.0.0.1:{port}/health") as response:
                    assert response.status == 200
                break
            except URLError:
                assert time.monotonic() < deadline, (folder.parent / "server.log").read_text()
                time.sleep(1)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    finally:
        server.terminate()
        server.wait(timeout=30)
