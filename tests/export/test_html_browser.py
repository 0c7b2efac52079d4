"""The exported page in headless Chromium, opened by its path: equal text and attention, every control by keyboard, attacks.

Skipped where Chromium or Playwright is not installed; `make browser-test` installs both and runs them.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from page_browser import EXECUTABLE, chromium, open_page, show_attention
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.api import copied_samples
from minigpt_hf.data.chat_format import ChatFormat
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.export.html import export_html
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import ROOT, tiny_model
from tests.export.page_runner import exported_page, greedy
from tests.export.test_html import chat_tokenizer, copy_with_samples

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser-test").expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed: make browser-test"),
]

SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1360, 900)}
PROMPT = "def format_help(self):\n    "
ATTACK = "</script><script>attacked()</script><img src=x onerror=attacked()>\"'<!--<script>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def file(run_folder, tmp_path_factory):
    """The page of a trained model with a sliding window of 33 tokens."""
    (page,) = export_html(run_folder / "model", tmp_path_factory.mktemp("html") / "out", "float32").iterdir()
    return page


@pytest.fixture
def opened(browser, file):
    """The open page; the test fails if the page writes to the console, raises an error, or requests anything."""
    yield from watched(browser, file)


def watched(browser, file, **options):
    page = open_page(browser, file, **options)
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: problems.append(request.url))
    page.reload()
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    yield page
    local = (file.resolve().as_uri(), "blob:", "data:")
    assert [problem for problem in problems if not problem.startswith(local)] == []
    page.context.close()


def finished(page):
    expect(page.locator("#generation-status")).to_contain_text("Finished", timeout=60_000)


def generated(page) -> list[int]:
    return page.evaluate("views.generate.currentIds()")


# -- equality ---------------------------------------------------------------------------------------------------------


def test_the_page_writes_the_greedy_text_of_torch(opened, run_folder):
    assert opened.url.startswith("file://")
    assert opened.evaluate("document.body.dataset.ready") == "WebAssembly"
    assert " · 2 layers of 4 attention heads · " in opened.inner_text("#summary")
    model, tokenizer = (auto.from_pretrained(run_folder / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    opened.fill("#prompt", PROMPT)
    opened.locator("#sampling input").first.press("Home")  # temperature 0
    opened.click("#generate")
    finished(opened)
    ids = tokenizer(PROMPT).input_ids
    expected = ids + greedy(model.eval(), ids, 200)
    assert generated(opened) == expected
    assert opened.inner_text("#output") == tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_starts_with_the_settings_of_the_model(browser, run_folder, tmp_path):
    """Also with values between two steps of a slider, or outside its range."""
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    settings = {"temperature": 0.73, "top_k": 250, "top_p": 0.975, "repetition_penalty": 2.5}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 0, **settings}))
    (file,) = export_html(folder, tmp_path / "out").iterdir()
    for page in watched(browser, file):
        found = page.evaluate("sampling")
        assert page.locator("#sampling output").first.inner_text() == "0.73"
    assert [found[name] for name in ("temperature", "topK", "topP", "repetitionPenalty")] == [*settings.values()]


def test_attention_and_probabilities_of_the_page_are_those_of_torch(opened, run_folder):
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model", attn_implementation="eager").eval()
    ids = list(range(2, 50))
    found = opened.evaluate(
        "(ids) => engine.run('inspect', { ids, ablated: [] })"
        ".then(({ attention, logits }) => ({ attention: [...attention], logits: [...logits] }))",
        ids,
    )
    with torch.no_grad():
        outputs = model(torch.tensor([ids]), output_attentions=True)
    attention = torch.cat(outputs.attentions).numpy()
    np.testing.assert_allclose(np.reshape(found["attention"], attention.shape), attention, atol=1e-4, rtol=0)
    logits = outputs.logits[0].numpy()
    np.testing.assert_allclose(np.reshape(found["logits"], logits.shape), logits, atol=1e-4, rtol=0)


def test_the_surprisal_of_a_text_is_that_of_torch_in_bits_per_byte(opened, run_folder, text):
    model, tokenizer = (auto.from_pretrained(run_folder / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    scored = text[1000:1400]
    ids = torch.tensor([[0, *tokenizer(scored).input_ids]])
    with torch.no_grad():
        bits = float(model.eval()(ids, labels=ids).loss) * (ids.shape[1] - 1) / np.log(2)
    opened.click("#tab-provenance")
    opened.fill("#score-text", scored)
    opened.click("#score")
    expected = f"{bits / len(scored.encode()):.3f} bits per byte"
    expect(opened.locator("#score-result")).to_contain_text(expected, timeout=60_000)
    assert opened.inner_text("#scored") == scored


# -- controls ---------------------------------------------------------------------------------------------------------


def test_text_is_generated_stopped_and_continued_from_another_token_by_keyboard(opened):
    keyboard = opened.keyboard
    opened.focus("#prompt")
    keyboard.type("def ")
    keyboard.press("Control+Enter")
    finished(opened)
    before = generated(opened)
    opened.focus("#output")
    for key in ("Home", "End", "ArrowLeft", "ArrowLeft"):
        keyboard.press(key)
    selected = opened.locator("#output [aria-selected=true]")
    expect(selected).to_have_count(1)
    assert opened.get_attribute("#output", "aria-activedescendant") == selected.get_attribute("id")
    index = len(before) - 3
    keyboard.press("Tab")
    keyboard.press("Tab")  # the second alternative
    label = opened.evaluate("document.activeElement.querySelector('.label').textContent")
    keyboard.press("Enter")
    finished(opened)
    after = generated(opened)
    assert after[:index] == before[:index]
    assert opened.evaluate("(id) => tokenLabel(id)", after[index]) == label


def test_generation_can_be_stopped_while_the_page_stays_responsive(browser, tmp_path):
    model = tiny_model(vocab_size=258, hidden_size=256, num_hidden_layers=8, use_sliding_window=True, sliding_window=33)
    model.generation_config.eos_token_id = None
    (opened,) = [next(pages := watched(browser, exported_page(model, byte_tokenizer(), tmp_path)))]
    opened.locator("#sampling input").last.press("End")  # 1,000 new tokens
    opened.fill("#prompt", "a")
    opened.click("#generate")
    expect(opened.locator("#generate")).to_have_text("Stop")
    expect(opened.locator("#generation-status")).to_contain_text("tokens/s", timeout=60_000)
    opened.keyboard.press("Escape")
    expect(opened.locator("#generation-status")).to_contain_text("Stopped", timeout=60_000)
    assert 1 < len(generated(opened)) < 1001
    expect(opened.locator("#generate")).to_have_text("Generate")
    next(pages, None)


def test_the_views_and_their_controls_work_by_keyboard(opened):
    keyboard = opened.keyboard
    opened.focus("#prompt")
    keyboard.type("def ")
    opened.focus("#tab-generate")
    keyboard.press("ArrowRight")
    expect(opened.locator("#view-inside")).to_be_visible()
    opened.fill("#inside-text", "the cat and the cat and the cat")
    expect(opened.locator("#head-scores .chip")).to_have_count(3, timeout=60_000)

    opened.focus("#position")
    keyboard.press("Home")
    expect(opened.locator("#position-number")).to_contain_text("Token 1 of")
    opened.focus("#inside-tokens")
    keyboard.press("End")
    expect(opened.locator("#inside-tokens [aria-selected=true]")).to_have_count(1)
    before = opened.inner_text("#prediction")
    opened.focus("#prediction-sliders input")
    keyboard.press("Home")
    assert opened.inner_text("#prediction") != before

    head = opened.locator("#heads .head").nth(5)
    head.focus()
    keyboard.press("Enter")
    expect(opened.locator("#head-title")).to_have_text("Layer 2, head 2")
    opened.focus("#ablate")
    keyboard.press("Enter")
    expect(opened.locator("#ablation-effect")).to_contain_text("bits per token", timeout=60_000)
    expect(opened.locator("#prediction .mark")).not_to_have_count(0)
    opened.focus("#restore")
    keyboard.press("Enter")
    expect(opened.locator("#ablation")).to_be_hidden()

    opened.focus("#tab-inside")
    keyboard.press("ArrowRight")
    opened.focus("#sample-slider")
    keyboard.press("Home")
    expect(opened.locator("#sample-title")).to_have_text("Before training")
    opened.focus("#score")
    keyboard.press("Enter")
    expect(opened.locator("#score-result")).to_contain_text("bits per byte", timeout=60_000)
    opened.focus("#theme")
    keyboard.press("Enter")
    assert opened.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_head_is_ablated_while_another_text_is_analysed(opened):
    show_attention(opened)
    opened.evaluate("['use-generated', 'ablate'].forEach((id) => byId(id).click())")
    expect(opened.locator("#ablation-effect")).to_contain_text("bits per token", timeout=60_000)


def test_the_passage_of_a_token_is_shown_by_keyboard(browser, run_folder, text_file, text, tmp_path):
    folder = copy_with_samples(run_folder, ["def "], [f"def {text[3000:3200]}"], tmp_path / "model")
    samples = [sample.to_dict() for sample in copied_samples(folder, text_file)]
    (file,) = export_html(folder, tmp_path / "out", samples=samples).iterdir()
    opened = next(pages := watched(browser, file))
    opened.click("#tab-provenance")
    expect(opened.locator("#copied-0")).to_have_text(f"def {text[3000:3200]}", use_inner_text=True)
    opened.focus("#copied-0")
    opened.keyboard.press("Home")
    expect(opened.locator(".passage")).to_have_text("Given to the model.")
    opened.keyboard.press("End")
    for _ in range(9):
        opened.keyboard.press("ArrowLeft")
    expect(opened.locator(".passage")).to_contain_text("tokens in document 1 of the training text")
    assert opened.locator(".passage mark").text_content() in text[3000:3200]
    next(pages, None)


def test_every_control_has_a_name_and_no_text_is_cut_off_at_three_sizes(browser, file, tmp_path):
    """The screenshots are kept in the temporary folder of pytest for inspection."""
    for name, (width, height) in SIZES.items():
        page = open_page(browser, file, viewport={"width": width, "height": height})
        show_attention(page)
        for view in ("generate", "inside", "provenance"):
            page.click(f"#tab-{view}")
            page.screenshot(path=tmp_path / f"{name}-{view}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, view)
            controls = page.locator("button:visible, input:visible, textarea:visible, [tabindex='0']:visible")
            for control in controls.all():
                named = control.evaluate(
                    "(node) => node.ariaLabel || node.textContent || node.labels?.[0]?.textContent"
                )
                labeled = control.get_attribute("aria-labelledby")
                assert (named or labeled or "").strip(), control.evaluate("(node) => node.outerHTML")
        page.context.close()
    assert len(list(tmp_path.glob("*.png"))) == 9


@pytest.fixture(scope="module")
def chat_page(tmp_path_factory):
    """The page of a model with a chat template, and the folder of the model."""
    tokenizer, folder = chat_tokenizer(), tmp_path_factory.mktemp("chat")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=300)
    model.generation_config.do_sample = False
    return exported_page(model, tokenizer, folder), folder / "model"


def test_a_conversation_is_continued_in_the_chat_layout(browser, chat_page):
    opened = next(pages := watched(browser, chat_page[0]))
    assert opened.is_checked("#mode-chat")
    expect(opened.locator("#system-note")).to_be_hidden()
    opened.locator("#sampling input").last.press("Home")  # 10 new tokens
    for number in (1, 3):
        opened.fill("#prompt", "<|im_end|> & <b>")
        opened.press("#prompt", "Enter")
        expect(opened.locator(".turn")).to_have_count(number)
        finished(opened)
    assert opened.locator(".turn.user").last.inner_text().endswith("<|im_end|> & <b>")
    expect(opened.locator("#output-role")).to_be_visible()
    opened.focus("#clear")
    opened.keyboard.press("Enter")
    expect(opened.locator(".turn")).to_have_count(0)
    assert generated(opened) == []
    opened.check("#mode-continue")
    expect(opened.locator("#prompt-label")).to_have_text("Prompt")
    next(pages, None)


def test_the_chat_states_that_the_system_messages_of_the_training_are_missing(browser, tmp_path):
    tokenizer = chat_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    save_model_files(model, tokenizer, tmp_path / "model")
    sample = {"conversations": [[{"role": "system", "content": "Add."}]]}
    (tmp_path / "model" / "minigpt.json").write_text(json.dumps({"recipe": {"chat": True}, "sample": sample}))
    (file,) = export_html(tmp_path / "model", tmp_path / "out").iterdir()
    opened = next(pages := watched(browser, file))
    assert " · 1 layer of 4 attention heads · " in opened.inner_text("#summary")
    expect(opened.locator("#system-note")).to_be_visible()
    opened.check("#mode-continue")
    expect(opened.locator("#system-note")).to_be_hidden()
    next(pages, None)


def test_greedy_text_changes_with_the_temperature(browser, chat_page):
    """`generation_config.json` of greedy models has a top-k of 1, with which it would not."""
    opened = next(pages := watched(browser, chat_page[0]))
    opened.fill("#prompt", "a")
    texts = []
    for key in ("Home", "End"):
        opened.locator("#sampling input").first.press(key)
        opened.click("#clear")
        opened.fill("#prompt", "a")
        opened.click("#generate")
        finished(opened)
        texts.append(generated(opened))
    assert texts[0] != texts[1]
    next(pages, None)


def test_a_question_is_analysed_and_its_answer_scored_in_the_chat_template(browser, chat_page):
    file, folder = chat_page
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    question, answer = "What is <|im_end|>?", "Nothing, ж."
    messages = [{"role": "user", "content": question}]
    given = ChatFormat(tokenizer).encode(messages, add_generation_prompt=True).tolist()
    ids = torch.tensor([[*given, *tokenizer(answer).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]])
    labels = ids.clone()
    labels[:, : len(given)] = -100
    with torch.no_grad():
        bits = float(model.eval()(ids, labels=labels).loss) * (ids.shape[1] - len(given)) / np.log(2)
    opened = next(pages := watched(browser, file))
    opened.click("#tab-provenance")
    opened.fill("#score-question", question)
    opened.fill("#score-text", answer)
    opened.click("#score")
    expected = f"{bits / len(answer.encode()):.3f} bits per byte"
    expect(opened.locator("#score-result")).to_contain_text(expected, timeout=60_000)

    opened.click("#tab-inside")
    opened.fill("#inside-text", question)
    expect(opened.locator("#position-number")).to_contain_text(f"of {len(given)}", timeout=60_000)
    next(pages, None)


def test_the_chat_layout_fits_at_three_sizes(browser, chat_page, tmp_path):
    """The screenshots are kept in the temporary folder of pytest for inspection."""
    for name, (width, height) in SIZES.items():
        page = open_page(browser, chat_page[0], viewport={"width": width, "height": height})
        page.fill("#prompt", "a long question, " * 10)
        page.press("#prompt", "Enter")
        finished(page)
        page.focus("#output")
        page.keyboard.press("Home")
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.context.close()


def test_without_a_bos_token_a_text_is_required_and_its_first_token_is_not_scored(browser, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    opened = next(pages := watched(browser, exported_page(tiny_model(vocab_size=258), tokenizer, tmp_path)))
    opened.click("#generate")
    expect(opened.locator("#error")).to_have_text("the model has no token that starts a text; enter a text")
    opened.click("#tab-provenance")
    opened.fill("#score-text", "abc")
    opened.click("#score")
    expect(opened.locator("#score-result")).to_contain_text("2 tokens", timeout=60_000)
    assert opened.inner_text("#scored") == "bc"
    next(pages, None)


# -- attacks ----------------------------------------------------------------------------------------------------------


def test_text_of_a_hostile_folder_never_becomes_markup(browser, run_folder, tmp_path):
    """Name, tokens, card, samples and template contain markup; it is shown as text and nothing is executed."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(ATTACK)])
    tokenizer.chat_template = ATTACK
    folder = tmp_path / "run" / "model"
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder)
    metadata = json.loads((run_folder / "model" / "minigpt.json").read_text())
    hostile = {"name": ATTACK, "license": ATTACK, "date": ATTACK, "sample": {"prompt": ATTACK}}
    stretches = [{"tokens": 8, "text": ATTACK, "of_tokens": 9}]
    figures = {"tokens": 9, "longest": 8, "shares": {"8": 0.5}}
    hostile["copying"] = {"samples": figures, "held_out": None, "stretches": stretches}
    for part in ("data", "tokenizer", "training"):
        hostile[part] = {key: ATTACK if isinstance(value, str) else value for key, value in metadata[part].items()}
    (folder / "minigpt.json").write_text(json.dumps({**metadata, **hostile}))
    rows = [{"step": 0, "sample": ATTACK}, {"step": 1, "tokens": 10, "loss": 2.0, ATTACK: ATTACK}]
    fingerprint = json.loads((run_folder / "fingerprint.json").read_text())
    (tmp_path / "run" / "fingerprint.json").write_text(json.dumps(fingerprint))
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (file,) = export_html(folder, tmp_path / "out").iterdir()
    assert file.read_text(encoding="utf-8").count(ATTACK) == 0
    opened = next(pages := watched(browser, file))
    expect(opened.locator("#name")).to_have_text(ATTACK)
    opened.click("#generate")
    finished(opened)
    assert ATTACK in opened.inner_text("#output")
    opened.click("#tab-inside")
    expect(opened.locator("#heads .head")).not_to_have_count(0, timeout=60_000)
    opened.click("#tab-provenance")
    assert opened.inner_text("#sample") == ATTACK
    assert opened.locator("#copied").inner_text().endswith(ATTACK)
    assert "50.0 %" in opened.locator("#copying-figures").inner_text()
    opened.click("#score")
    expect(opened.locator("#score-result")).to_contain_text("bits per byte", timeout=60_000)
    assert opened.locator("img, iframe, object, embed").count() == 0
    assert opened.locator("script").count() == file.read_text().count("</script>")
    next(pages, None)  # no error, dialog or request


def test_the_policy_forbids_requests_inline_scripts_and_evaluation(browser, file):
    page = open_page(browser, file)
    blocked = page.evaluate(
        """async () => {
          const violations = [];
          document.addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
          const image = new Image();
          image.src = "http://127.0.0.1:9/x.png";
          await fetch("http://127.0.0.1:9/").catch(() => null);
          const script = document.createElement("script");
          script.textContent = "window.attacked = true";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<button id=inline onclick='window.attacked = true'></button>");
          document.getElementById("inline").click();
          await new Promise((resolve) => setTimeout(resolve, 100));
          return { violations, attacked: window.attacked ?? null };
        }"""
    )
    assert blocked["attacked"] is None
    assert {"connect-src", "img-src", "script-src-elem", "script-src-attr"} <= set(blocked["violations"])
    page.context.close()


def test_without_webassembly_the_page_uses_javascript(browser, file, tmp_path):
    shutil.copy(file, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text().replace(" 'wasm-unsafe-eval'", "")
    (tmp_path / "page.html").write_text(html)
    page = open_page(browser, tmp_path / "page.html")
    assert page.evaluate("document.body.dataset.ready") == "JavaScript"
    page.click("#generate")
    finished(page)
    page.context.close()


def test_the_benchmark_reports_the_speed():
    argv = [
        sys.executable,
        ROOT / "scripts" / "benchmark.py",
        "page",
        "--tiny",
        "--tokens",
        "20",
        "--repeats",
        "1",
        "--json",
    ]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["page"]
    assert row["model"] == "tiny"
    assert int(row["tokens/s"].replace(",", "")) > 0
