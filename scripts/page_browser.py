"""Open an exported page in headless Chromium, driven by Playwright.

    python scripts/page_browser.py runs/bard/page/bard.html docs/page.png       # the picture of the README

Needs Chromium (`apt-get install chromium`) and Playwright (`pip install playwright`), which starts that browser instead of
one that it downloads; `make browser-test` installs both.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"),  # the sandbox does not start as root
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
READY = "body[data-ready]"  # set when the worker has decoded the weights


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser of Playwright."""
    from playwright.sync_api import sync_playwright

    if EXECUTABLE is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(FLAGS))
        yield browser
        browser.close()


def open_page(browser: Any, address: Path | str, **options: Any) -> Any:
    """Open a page and return it when the model is ready.

    Args:
        address: A path, which is opened without network, or a URL.
        options: Options of `browser.new_context`, e.g. `viewport` and `color_scheme`.
    """
    page = browser.new_context(offline=isinstance(address, Path), **options).new_page()
    page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
    page.wait_for_selector(READY, timeout=60_000)
    return page


def show_attention(page: Any) -> None:
    """Generate text, and open the view "Look inside" at the heads."""
    from playwright.sync_api import expect

    page.click("#generate")
    expect(page.locator("#generation-status")).to_contain_text("Finished", timeout=60_000)
    page.click("#tab-inside")
    page.wait_for_selector("#inside-stages:not([hidden])")


def main() -> None:
    """Save a picture of the attention of a generated text."""
    from PIL import Image

    parser = argparse.ArgumentParser(description="Save a picture of an exported page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    with chromium() as browser:
        page = open_page(browser, args.page, viewport={"width": 1160, "height": 1200}, color_scheme="light")
        show_attention(page)
        page.locator("#heads .head").nth(1).click()
        page.wait_for_timeout(300)  # the small matrices are drawn in the next frame
        box = page.locator(".stage", has=page.locator("#heads")).bounding_box()
        box |= {"x": 0, "width": 1160}
        page.screenshot(path=args.picture, full_page=True, clip=box)
    Image.open(args.picture).convert("RGB").quantize(64).save(args.picture, optimize=True)  # a third of the size


if __name__ == "__main__":
    main()
