"""The card tells what is so, in a form that the Hub takes, and what it shows to be typed can be typed."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import character_tokenizer
from minigpt_hf.publish.card import code, energy, eval_results, fenced, literal, render_card, shell
from minigpt_hf.publish.model_folder import write_model_folder
from minigpt_hf.publish.push import push_folder
from tests.conftest import ROOT, tiny_config, tiny_model
from tests.hub_server import TOKEN


@pytest.fixture
def about(run_folder):
    return json.loads((run_folder / "model" / "minigpt.json").read_text())


@pytest.fixture
def card(run_folder) -> str:
    return (run_folder / "model" / "README.md").read_text()


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


WITHOUT_THE_PACKAGE = 'import sys\nsys.modules["minigpt_hf"] = None  # importing it fails\n'


def in_a_clean_process(snippet: str, folder, tmp_path, **env) -> str:
    """What it prints, with nothing in the cache of modules and nobody to answer a question."""
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT), **env},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout


def test_the_snippets_of_a_card_run_in_its_folder_and_continue_the_prompt(
    run_folder, card, tmp_path, monkeypatch, capsys
):
    folder = run_folder / "model"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    remote, packaged = blocks(card, "python")
    assert in_a_clean_process(WITHOUT_THE_PACKAGE + remote, folder, tmp_path).startswith("def ")
    assert in_a_clean_process(packaged, folder, tmp_path).startswith("def ")
    program, *argv = shlex.split(blocks(card, "bash")[0])
    assert program == "minigpt"
    monkeypatch.chdir(folder)
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_snippets_of_a_pushed_card_load_it_from_the_hub(run_folder, hub, tmp_path, monkeypatch, capsys):
    push_folder(run_folder / "model", "user/tiny")
    card = hub.files("user/tiny", "main")["README.md"].decode()
    remote, packaged = blocks(card, "python")
    assert '"user/tiny"' in remote
    assert '"."' not in card
    env = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    assert in_a_clean_process(WITHOUT_THE_PACKAGE + remote, tmp_path, tmp_path, **env).startswith("def ")
    assert in_a_clean_process(packaged, tmp_path, tmp_path, **env).startswith("def ")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks(card, "bash")[0])[1:]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_the_tokenizer_of_a_folder_loads_without_a_question_and_equals_the_packages(run_folder, tmp_path):
    """The model's configuration names code, so transformers asks unless it is told that none is to be run."""
    load = "from transformers import AutoTokenizer\nprint(AutoTokenizer.from_pretrained('.', trust_remote_code=False)"
    ids = in_a_clean_process(f"{WITHOUT_THE_PACKAGE}{load}('def main').input_ids)", run_folder / "model", tmp_path)
    assert ids == f"{AutoTokenizer.from_pretrained(run_folder / 'model')('def main').input_ids}\n"


def test_the_package_is_installed_from_where_the_project_says_it_is(card):
    """No registry has it: as soon as the project names its repository, cards are to name it, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = {name.lower(): url for name, url in project.get("urls", {}).items()}.get("repository")
    assert f"pip install git+{address}" if address else "pip install PATH/TO/minigpt-hf" in card
    for document in (card, (ROOT / "README.md").read_text(), *(f.read_text() for f in (ROOT / "docs").glob("*.md"))):
        assert not re.search(r"pypi\.org|pip install ['\"]?minigpt-hf", document)


def test_doing_it_again_as_the_card_says_gives_the_same_figures(card, about, text_file, tmp_path, monkeypatch):
    (tmp_path / "argparse.py").write_bytes(text_file.read_bytes())
    (tmp_path / "recipe.yaml").write_text(blocks(card, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks(card, "bash")[1])[1:]) == 0
    again = json.loads((tmp_path / "runs" / "again" / "model" / "minigpt.json").read_text())
    assert again["results"] == about["results"]
    assert again["data"] == about["data"]
    assert again["sample"] == about["sample"]


def test_the_figures_are_those_of_the_run_and_nothing_is_left_open(run_folder, card, about):
    assert not re.search(r"\{\{|\}\}|\{%|TODO|None|\bnan\b|More Information Needed", card)
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    results = about["results"]
    assert f"| {results['bits_per_byte']:.4f} | {results['perplexity']:.3f} | {results['loss']:.4f} |" in card
    train = about["data"]["train"]
    counts = [f"{train[name]:,}" for name in ("documents", "characters", "bytes", "tokens")]
    assert f"| training | {' | '.join(counts)} | `{train['fingerprint'][:16]}` |" in card
    assert yaml.safe_load(blocks(card, "yaml")[0]) == about["recipe"]


def test_samples_are_the_first_three_seeds_of_the_published_weights(run_folder, card, about, capsys):
    assert len(about["sample"]["texts"]) == len(set(about["sample"]["texts"])) == 3
    for seed, text in enumerate(about["sample"]["texts"]):
        argv = ["generate", run_folder / "model", "--prompt", "def ", "--max_new_tokens", 10, "--seed", seed]
        assert main([str(word) for word in argv]) == 0
        assert capsys.readouterr().out.strip() == text.strip()
        assert f"```text\n{text}\n```\n" in card


def test_energy_is_time_times_devices_times_watts(about, card):
    training = about["training"]
    power = training["power"]
    assert (power["kind"], power["watts"]) == ("processor core", 12)
    expected = training["seconds"] * power["devices"] * 12 / 3600
    rounded = 0.05 * power["devices"] * 12 / 3600  # the seconds are, to a tenth
    assert training["energy_wh"] == pytest.approx(expected, abs=1.01 * rounded)
    assert f"| {energy(training['energy_wh'])} = " in card
    assert [energy(value) for value in (0.007142, 9.96, 950, 1234, 1234567)] == [
        *("0.0071 Wh", "10 Wh", "950 Wh", "1.2 kWh", "1,200 kWh")
    ]


def test_metadata_is_what_the_hub_reads_and_takes(about, hub):
    about |= {"language": ["no", "code"], "license": "cc-by-4.0"}
    about["data"]["dataset"] = "user/plays"
    card = ModelCard(render_card(about, tiny_config()), ignore_metadata_errors=False)
    card.validate()  # asks the Hub
    data = card.data
    assert (data.language, data.license, data.datasets) == (["no", "code"], "cc-by-4.0", ["user/plays"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.widget == [{"text": "def "}]
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    assert metrics == {name: round(about["results"][name], 4) for name in ("loss", "perplexity", "bits_per_byte")}
    measured = {name: about["results"][name] for name in ("block_size", "stride", "tokens", "bytes")}
    assert all(result.metric_args == measured and result.dataset_split == "validation" for result in data.eval_results)
    about["license"] = "my-own"
    with pytest.raises(ValueError, match="must be one of"):
        ModelCard(render_card(about, tiny_config())).validate()


def test_what_nobody_stated_is_not_in_the_metadata(about):
    about |= {"language": [], "license": None, "results": {}}
    about["data"]["validation"] = None
    about["sample"] |= {"prompt": "", "texts": []}
    card = ModelCard(render_card(about, tiny_config()))
    stated = {name: value for name, value in card.data.to_dict().items() if value is not None}
    assert set(stated) == {"library_name", "pipeline_tag", "tags"}
    assert "How well" not in card.text
    assert "## What it writes" not in card.text
    assert "not stated: ask whoever published it" in card.text
    assert '"<|endoftext|>"' in card.text  # what a new document begins with, in place of a prompt


def test_results_on_a_data_set_of_the_hub_are_told_in_its_own_format(about, tmp_path):
    assert eval_results(about) is None  # a text of one's own is no benchmark
    about["data"]["dataset"] = "user/plays"
    write_model_folder(tmp_path / "model", tiny_model(), character_tokenizer(["ab"]), about, [])
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / "model/.eval_results/validation.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("user/plays", round(about["results"]["bits_per_byte"], 4))
    assert entry.date == about["date"]
    assert "windows of 32" in entry.notes


@pytest.mark.parametrize("name", ["training", "recipe", "tokenizer", "license", "sample", "torch"])
def test_a_figure_that_is_not_known_is_an_error(name, about):
    del about[name]
    with pytest.raises((jinja2.UndefinedError, KeyError), match=name):
        render_card(about, tiny_config())


ESCAPES = "```\n# not a heading\n````\n<script>alert(1)</script>\x1b[2J\u202e {{ 7 * 7 }} | `a` |"


def test_no_text_gets_out_of_its_place(about):
    plain = render_card(about, tiny_config())
    about["sample"] |= {"prompt": ESCAPES, "texts": [ESCAPES, "~~~\n---\n```"]}
    about["data"]["name"] = about["recipe"]["sample_prompt"] = ESCAPES
    about["recipe"]["data"] = "a\n```\n# b"
    card = render_card(about, tiny_config())
    assert headings(card) == headings(plain)
    assert not re.search("[\x1b\u202e]", card)
    assert f"write({literal(ESCAPES)}" in blocks(card, "python")[1]
    assert eval(literal(ESCAPES)) == ESCAPES
    assert subprocess.check_output(["bash", "-c", f"printf %s {shell(ESCAPES)}"], text=True) == ESCAPES


def headings(card: str) -> list[str]:
    """Headings as CommonMark sees them: a fence ends with at least as many marks as it began with."""
    found, fence = [], None
    for line in ModelCard(card).text.splitlines():
        marks = re.match(r"(`{3,}|~{3,})", line)
        if fence is None and marks:
            fence = marks[1]
        elif fence and line.rstrip() == line[0:1] * len(line.rstrip()) and line.startswith(fence):
            fence = None
        elif fence is None and line.startswith("#"):
            found.append(line)
    assert fence is None
    return found


def test_marks_are_longer_than_any_in_the_text():
    assert code("a`b|c\nd") == "``a`b\\|c d``"
    assert code("def ") == "` def  `"  # CommonMark takes one space from either side
    assert fenced("a\n````\nb") == "`````text\na\n````\nb\n`````"
