"""The page of a Space, fetched from the local Hub server by headless Chromium, writes the greedy text of torch.

Skipped where Chromium or Playwright is not installed; `make browser-test` installs both and runs them.
"""

import pytest
from page_browser import EXECUTABLE, READY, chromium, open_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.cli import main
from tests.export.page_runner import greedy

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser-test").expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed: make browser-test"),
]

PROMPT = "def format_help(self):\n    "
NEW_TOKENS = 200  # the default of the page


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def site(run_folder, hub) -> str:
    """The URL of the Space that `minigpt push --space` has created."""
    assert main(["push", str(run_folder / "model"), "--repo-id", "user/tiny", "--space"]) == 0
    return hub.static_site("user/tiny")


def expected_text() -> str:
    """Greedy text of the native model, loaded from the Hub without trust."""
    model, tokenizer = (auto.from_pretrained("user/tiny") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(PROMPT).input_ids
    return tokenizer.decode(ids + greedy(model.eval(), ids, NEW_TOKENS), skip_special_tokens=True)


def write(page) -> str:
    """Generate greedily with the controls of the page or frame, and return the text."""
    page.locator("#prompt").fill(PROMPT)
    page.locator("#sampling input").first.press("Home")  # temperature 0
    page.locator("#generate").click()
    expect(page.locator("#generation-status")).to_contain_text("Finished", timeout=60_000)
    return page.locator("#output").inner_text()


def test_the_page_of_a_pushed_model_writes_the_greedy_text_of_torch(browser, site):
    page = open_page(browser, site)
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.reload()
    page.wait_for_selector(READY, timeout=60_000)
    expect(page.locator("#name")).to_have_text("user/tiny")
    assert write(page) == expected_text()
    assert [url for url in requests if not url.startswith(("blob:", "data:"))] == [site]
    assert problems == []
    page.context.close()


def test_the_page_runs_in_a_frame_of_another_origin_as_the_hub_shows_it(browser, site, hub):
    page = browser.new_context().new_page()
    page.goto(f"{hub.endpoint}/user/tiny/resolve/main/README.md")
    sandbox = "allow-downloads allow-forms allow-popups allow-same-origin allow-scripts"
    page.set_content(f'<iframe src="{site}" sandbox="{sandbox}" width="900" height="900"></iframe>')
    frame = page.frame_locator("iframe")
    expect(frame.locator(READY)).to_be_visible(timeout=60_000)
    assert write(frame) == expected_text()
    page.context.close()
