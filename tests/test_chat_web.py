"""`minigpt chat --web` in headless Chromium: answers, history, settings, stopping, hostile text, and no other server.

Skipped where Gradio, Chromium or Playwright is not installed; `make browser-test` installs and runs them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
from page_browser import EXECUTABLE, chromium

import minigpt_hf
from minigpt_hf.cli import main
from minigpt_hf.cli.chat_web import Page
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.inference.generation import generate, load
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import ROOT, tiny_model

without_browser = pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed: make browser-test")
TEXT = "  <img src=x onerror=alert(1)> ![x](http://192.0.2.1/x.png)\n\n    **b** $x$ &amp; </p> <b>\n"


@contextmanager
def served(folder, *flags):
    """Run the command; yield its process and the URL of the page."""
    pytest.importorskip("gradio", reason="Gradio is not installed: make browser-test")
    argv = [sys.executable, "-m", "minigpt_hf.cli", "chat", str(folder), "--web", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=folder, env=env) as process:
        try:
            yield process, process.stdout.readline().partition(" ")[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 0


@contextmanager
def opened(browser, url):
    """Open the page; fail if it raises an error or contacts another server."""
    page, problems = browser.new_page(viewport={"width": 1000, "height": 900}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: problems.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.get_by_text("Settings").click(timeout=120_000)
    yield page
    assert [problem for problem in problems if not problem.startswith((url, "blob:", "data:"))] == []
    page.close()


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="Playwright is not installed: make browser-test")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def chat_url(chat_run):
    with served(chat_run / "model", "--max_new_tokens", "8") as (_, url):
        yield url


@pytest.fixture(scope="module")
def text_url(run_folder):
    with served(run_folder / "model") as (_, url):
        yield url


def ask(page, question: str) -> None:
    """Send a message, and wait until it is answered."""
    from playwright.sync_api import expect

    answers = page.locator(".bot.message .md")
    answered = answers.count()
    page.locator("[data-testid=textbox]").first.fill(question)
    page.keyboard.press("Enter")
    expect(answers).to_have_count(answered + 1, timeout=60_000)
    expect(page.locator(".submit-button")).to_be_visible(timeout=60_000)


def shown(page) -> list[dict]:
    """The messages in the page."""
    roles = {"user": page.locator(".user.message"), "assistant": page.locator(".bot.message")}
    texts = {role: found.locator(".md").all_text_contents() for role, found in roles.items()}
    turns = zip(texts["user"], texts["assistant"], strict=True)
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def expected(folder, messages: list[dict], **options) -> str:
    model, tokenizer = minigpt_hf.load(folder)
    return generate(model, tokenizer, messages, max_new_tokens=8, **options)[0]


@pytest.mark.slow
@without_browser
def test_answers_follow_the_conversation_until_it_is_cleared(browser, chat_url, chat_run):
    with opened(browser, chat_url) as page:
        ask(page, "3 + 1")
        ask(page, "Thanks")
        first = shown(page)
        assert [message["content"] for message in first[::2]] == ["3 + 1", "Thanks"]
        for turn in (1, 3):
            assert first[turn]["content"] == expected(chat_run / "model", first[:turn])
        page.get_by_role("button", name="Clear").click()  # the symbol above the messages
        page.get_by_text("Ask a question.").wait_for()
        ask(page, "Thanks")
        second = shown(page)
        assert second[1]["content"] == expected(chat_run / "model", second[:1])


@pytest.mark.slow
@without_browser
def test_the_system_message_and_sampling_settings_are_used(browser, chat_url, chat_run):
    question = {"role": "user", "content": "3 + 1"}
    with opened(browser, chat_url) as page:
        page.get_by_label("System message").fill("Add.")
        page.get_by_label("number input for Temperature").fill("1.5")
        page.get_by_label("number input for Maximum number of new tokens").fill("7")
        page.get_by_label("Seed").fill("3")
        ask(page, "3 + 1")
        (answer,) = shown(page)[1:]
        messages = [{"role": "system", "content": "Add."}, question]
        options = {"do_sample": True, "temperature": 1.5, "seed": 3, "max_new_tokens": 7}
        model, tokenizer = minigpt_hf.load(chat_run / "model")
        assert answer["content"] == generate(model, tokenizer, messages, **options)[0]
        page.get_by_label("Seed").fill("three")
        page.locator("[data-testid=textbox]").first.fill("3 + 1")
        page.keyboard.press("Enter")
        page.get_by_text("the seed is 'three': an integer is required").wait_for()


@pytest.mark.slow
@without_browser
def test_text_is_shown_as_it_is_and_the_model_receives_it_unchanged(browser, chat_url, chat_run):
    """Also in the history: markup in a message is text."""
    with opened(browser, chat_url) as page:
        ask(page, TEXT)
        ask(page, "Thanks")
        messages = shown(page)
        assert messages[0]["content"] == TEXT
        for turn in (1, 3):
            assert messages[turn]["content"] == expected(chat_run / "model", messages[:turn])


@pytest.mark.slow
@without_browser
def test_a_base_model_continues_the_text_and_can_continue_it_again(browser, text_url, run_folder):
    from playwright.sync_api import expect

    model, tokenizer = minigpt_hf.load(run_folder / "model")
    with opened(browser, text_url) as page:
        assert page.get_by_role("tab", name="Continuation").is_visible()
        page.get_by_label("number input for Temperature").fill("0")
        page.get_by_label("number input for Maximum number of new tokens").fill("9")
        text = page.get_by_label("Text")
        text.fill("def ")
        before = "def "
        for _ in range(2):
            after = generate(model, tokenizer, before, max_new_tokens=9, do_sample=False)[0]
            page.get_by_role("button", name="Continue").click()
            expect(text).to_have_value(after, timeout=60_000)
            before = after
        page.get_by_role("button", name="Reset", exact=True).click()
        expect(text).to_have_value("")


@pytest.mark.slow
@without_browser
def test_stop_ends_the_generation_and_the_next_one_starts(browser, tmp_path):
    from playwright.sync_api import expect

    model = tiny_model(vocab_size=258, hidden_size=256, num_hidden_layers=8, max_position_embeddings=2049)
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    flags = ["--max_new_tokens", "2000", "--min_new_tokens", "2000", "--do_sample", "false"]
    with served(tmp_path / "model", *flags) as (process, url), opened(browser, url) as page:
        text, server = page.get_by_label("Text"), psutil.Process(process.pid)
        for _ in range(2):
            text.fill("a")
            page.get_by_role("button", name="Continue").click()
            expect(text).not_to_have_value("a", timeout=60_000)
            page.get_by_role("button", name="Stop").click()
            page.wait_for_timeout(1000)
            before, spent = text.input_value(), server.cpu_times().user
            page.wait_for_timeout(1000)
            assert text.input_value() == before and len(before) < 2000
            assert server.cpu_times().user - spent < 0.5


@pytest.mark.slow
def test_the_server_listens_on_the_loopback_interface_and_connects_to_no_other(run_folder):
    with served(run_folder / "model") as (process, url):
        connections = psutil.Process(process.pid).net_connections(kind="inet")
        assert {each.laddr.ip for each in connections} == {"127.0.0.1"}
        assert {each.raddr.ip for each in connections if each.raddr} <= {"127.0.0.1"}
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)


def test_a_port_in_use_and_flags_without_web_are_errors(run_folder, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: make browser-test")
    argv = ["chat", str(run_folder / "model")]
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        assert main([*argv, "--web", "--port", port]) == 2
        assert f"no server can listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("temperature", "warm"), ("top_p", "true"), ("max_length", "9")])
def test_options_that_the_page_cannot_show_are_errors(name, value, run_folder, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: make browser-test")
    assert main(["chat", str(run_folder / "model"), "--web", f"--{name}", value]) == 2
    assert f"--{name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--port", "8000"], "--port requires --web"),
        (["--host", "::1"], "--host requires --web"),
        (["--web", "--port", "70000"], "--port 70000: a number from 1 to 65535 is required"),
    ],
)
def test_flags_of_the_page_are_checked(flags, message, run_folder, capsys):
    assert main(["chat", str(run_folder / "model"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_values_outside_the_usual_ranges_are_neither_shortened_nor_rejected(run_folder):
    pytest.importorskip("gradio", reason="Gradio is not installed: make browser-test")
    model, tokenizer = load(str(run_folder / "model"))
    options = {"max_new_tokens": 5000, "do_sample": True, "temperature": 3.0, "top_p": 0.01}
    new_tokens, temperature, top_p, _ = Page(model, tokenizer, options).sampling(None)
    for slider, value in ((new_tokens, 5000), (temperature, 3.0), (top_p, 0.01)):
        assert slider.value == value
        assert slider.minimum <= value <= slider.maximum


def test_a_temperature_of_zero_is_the_most_probable_token_for_a_model_that_samples(run_folder):
    pytest.importorskip("gradio", reason="Gradio is not installed: make browser-test")
    model, tokenizer = load(str(run_folder / "model"))
    assert model.generation_config.do_sample
    page = Page(model, tokenizer, {"temperature": 0.0, "top_p": 0.0})
    values = [each.value for each in page.sampling(None)]
    assert values[1:3] == [0, 0]
    assert page.generation_options(*values)["do_sample"] is False


@pytest.mark.parametrize(
    "name, value, limit",
    [
        ("max_new_tokens", 0, "finite and at least 1"),
        ("temperature", -1.0, "finite and at least 0"),
        ("temperature", float("inf"), "finite and at least 0"),
        ("top_p", -0.5, "from 0 to 1"),
        ("top_p", 1.5, "from 0 to 1"),
    ],
)
def test_numbers_that_generation_rejects_are_errors_before_the_page_is_served(name, value, limit, run_folder):
    model, tokenizer = load(str(run_folder / "model"))
    with pytest.raises(MiniGPTError, match=f"--{name} {value}: must be {limit}"):
        Page(model, tokenizer, {name: value})


def test_without_gradio_the_extra_is_named(run_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it fails
    assert main(["chat", str(run_folder / "model"), "--web"]) == 2
    assert "--web requires Gradio: `pip install gradio`" in capsys.readouterr().err
