"""Use the local Hub cache without delay when the Hub cannot be reached.

The Hub clients retry for about 30 seconds; here a single request with a short timeout decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session

TIMEOUT_SECONDS = 4


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Set `huggingface_hub` and `datasets` to offline mode within the block if the Hub does not answer a HEAD request."""
    import datasets  # here because it takes half a second, and most models are local folders

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not before[0]:
        try:
            get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
        except (HTTPError, OSError):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
