"""Whether the Hub can be reached: asked once, shortly, where its clients would try for half a minute.

In: nothing. Out: within a block, clients that look into their caches alone, if it cannot. It refuses nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session

SECONDS = 4


@contextmanager
def cache_alone_if_unreachable() -> Iterator[None]:
    """In the block `huggingface_hub` and `datasets` are offline if the Hub does not answer a HEAD within `SECONDS`."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not before[0]:
        try:
            get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS)
        except (HTTPError, OSError):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
