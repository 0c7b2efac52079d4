"""Assemble the HTML page: one file with code, style, weights and data, and a policy that forbids every request.

Text of the model folder (names, tokens, card, samples) never becomes markup: it is JSON in a data block, in which every `<`
is escaped, and the code of the page inserts it as text. The content security policy allows only the scripts and the style of
this package, identified by their hashes, and no connection.
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("page")
TEMPLATE = "index.html"
INCLUDE = re.compile(r"/\* include (\S+) \*/")
CODE = re.compile(r"<(script|style)(?: id=\"[\w-]+\")?>(.*?)</\1>", re.DOTALL)


def document(data: dict[str, Any], weights: bytes) -> str:
    """Return the page.

    Args:
        data: Everything but the weights, as JSON values; see `html.export_html`.
        weights: The content of all tensors.
    """
    page = INCLUDE.sub(lambda match: _source(match[1]), _source(TEMPLATE))
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in CODE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])} 'wasm-unsafe-eval'",
            f"style-src {' '.join(hashes['style'])}",
            "worker-src blob:",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    values = {"policy": policy, "data": embedded(data), "weights": base64.b64encode(weights).decode()}
    return re.sub("@(policy|data|weights)@", lambda match: values[match[1]], page)


def embedded(data: Any) -> str:
    """Return JSON that can be the text of a `<script>` element, in ASCII; numbers that are not finite become null.

    >>> embedded({"a": "</script>é"})
    '{"a": "\\\\u003c/script>\\\\u00e9"}'
    """
    return json.dumps(_finite(data), allow_nan=False).replace("<", r"\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _source(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
