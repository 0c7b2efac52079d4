"""The model card: its figures equal the metadata, its metadata is valid on the Hub, its snippets and commands run."""

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
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import hub_datasets
from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.export import export_model
from minigpt_hf.publish.card import cell, code, energy, fenced, literal, render_card, shell
from minigpt_hf.publish.model_folder import write_model_folder
from minigpt_hf.publish.push import push_folder
from tests.conftest import ROOT, tiny_config, tiny_model
from tests.hub_server import TOKEN


@pytest.fixture
def metadata(run_folder):
    return json.loads((run_folder / "model" / "minigpt.json").read_text())


@pytest.fixture
def card(run_folder) -> str:
    return (run_folder / "model" / "README.md").read_text()


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


WITHOUT_THE_PACKAGE = 'import sys\nsys.modules["minigpt_hf"] = None  # importing it fails\n'


def run_in_a_new_process(snippet: str, folder, tmp_path, **env) -> str:
    """Run a snippet in a new process with an empty module cache and without standard input; return its output."""
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


@pytest.mark.slow
def test_the_snippets_of_a_card_run_in_its_folder_and_continue_the_prompt(
    run_folder, card, tmp_path, monkeypatch, capsys
):
    folder = run_folder / "model"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    remote, packaged = blocks(card, "python")
    assert run_in_a_new_process(WITHOUT_THE_PACKAGE + remote, folder, tmp_path).startswith("def ")
    assert run_in_a_new_process(packaged, folder, tmp_path).startswith("def ")
    program, *argv = shlex.split(blocks(card, "bash")[0])
    assert program == "minigpt"
    monkeypatch.chdir(folder)
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_the_snippets_of_a_pushed_card_load_it_from_the_hub(run_folder, hub, tmp_path, monkeypatch, capsys):
    push_folder(run_folder / "model", "user/tiny")
    card = hub.files("user/tiny", "main")["README.md"].decode()
    native, readable = blocks(card, "python")
    assert '"."' not in card
    env = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": TOKEN}
    assert run_in_a_new_process(WITHOUT_THE_PACKAGE + native, tmp_path, tmp_path, **env).startswith("def ")
    name = run_in_a_new_process(f"{WITHOUT_THE_PACKAGE}{readable}print(type(model))", tmp_path, tmp_path, **env)
    assert name.startswith("<class 'transformers_modules.") and name.endswith(".MiniGPTForCausalLM'>\n")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks(card, "bash")[0])[1:]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_the_tokenizer_of_a_folder_loads_without_a_question_and_equals_the_packages(run_folder, tmp_path):
    """`config.json` refers to code, so transformers asks for permission unless `trust_remote_code` is given."""
    load = "from transformers import AutoTokenizer\nprint(AutoTokenizer.from_pretrained('.', trust_remote_code=False)"
    ids = run_in_a_new_process(f"{WITHOUT_THE_PACKAGE}{load}('def main').input_ids)", run_folder / "model", tmp_path)
    assert ids == f"{AutoTokenizer.from_pretrained(run_folder / 'model')('def main').input_ids}\n"


def test_the_package_is_installed_from_where_the_project_says_it_is(card):
    """The package is in no registry. If the project states a repository, cards must state it as well."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = {name.lower(): url for name, url in project.get("urls", {}).items()}.get("repository")
    assert f"pip install git+{address}" if address else "pip install PATH/TO/minigpt-hf" in card
    for document in (card, (ROOT / "README.md").read_text(), *(f.read_text() for f in (ROOT / "docs").glob("*.md"))):
        assert not re.search(r"pypi\.org|pip install ['\"]?minigpt-hf", document)


def test_the_commands_of_the_section_reproduce_give_the_same_figures(card, metadata, text_file, tmp_path, monkeypatch):
    (tmp_path / "argparse.py").write_bytes(text_file.read_bytes())
    (tmp_path / "recipe.yaml").write_text(blocks(card, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(blocks(card, "bash")[1])[1:]) == 0
    again = json.loads((tmp_path / "runs" / "again" / "model" / "minigpt.json").read_text())
    assert again["results"] == metadata["results"]
    assert again["data"] == metadata["data"]
    assert again["sample"] == metadata["sample"]


def test_the_section_reproduce_states_on_what_the_result_depends(metadata):
    assert "minigpt train --recipe" in render_card(metadata, tiny_config())
    metadata["training"] |= {"processes": 2, "precision": "bfloat16"}
    metadata["recipe"]["init_from"] = "model"
    card = render_card(metadata, tiny_config())
    assert blocks(card, "bash")[1].startswith("torchrun --nproc-per-node 2 -m minigpt_cli train --recipe recipe.yaml")
    assert "on the same type of machine and with 2 processes, the results" in card
    assert "identical if the fingerprints of the text are, and if `init_from` is the same model." in card
    assert "reproduces this score, up to rounding: training computed in bfloat16." in card


def test_the_figures_are_those_of_the_run_and_no_placeholder_remains(run_folder, card, metadata):
    assert not re.search(r"\{\{|\}\}|\{%|TODO|None|\bnan\b|More Information Needed", card)
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    results = metadata["results"]
    assert f"| {results['bits_per_byte']:.4f} | {results['perplexity']:.3f} | {results['loss']:.4f} |" in card
    train = metadata["data"]["train"]
    counts = [f"{train[name]:,}" for name in ("documents", "characters", "bytes", "tokens")]
    assert f"| training | {' | '.join(counts)} | `{train['fingerprint'][:16]}` |" in card
    assert yaml.safe_load(blocks(card, "yaml")[0]) == metadata["recipe"]


def test_samples_are_the_first_three_seeds_of_the_published_weights(run_folder, card, metadata, capsys):
    assert len(metadata["sample"]["texts"]) == len(set(metadata["sample"]["texts"])) == 3
    for seed, text in enumerate(metadata["sample"]["texts"]):
        argv = ["generate", run_folder / "model", "--prompt", "def ", "--max_new_tokens", 10, "--seed", seed]
        assert main([str(word) for word in argv]) == 0
        assert capsys.readouterr().out.strip() == text.strip()
        assert f"```text\n{text}\n```\n" in card
    assert "Not selected: seeds 0 to 2, temperature 0.8, at most 10 tokens, " in card  # a document may end before


def test_the_card_states_if_the_samples_are_those_of_an_earlier_step(card, metadata):
    """The checkpoint that is saved and pushed after a signal has no samples of its own."""
    assert metadata["sample"]["step"] == metadata["training"]["published_step"]
    assert "Generated with the weights after step" not in card
    metadata["training"]["published_step"] += 4
    step = metadata["sample"]["step"]
    assert f"Generated with the weights after step {step}." in render_card(metadata, tiny_config())


def test_energy_is_time_times_devices_times_watts(metadata, card):
    training = metadata["training"]
    power = training["power"]
    assert (power["kind"], power["watts"]) == ("processor core", 12)
    expected = training["seconds"] * power["devices"] * 12 / 3600
    rounded = 0.05 * power["devices"] * 12 / 3600  # seconds are rounded to a tenth
    assert training["energy_wh"] == pytest.approx(expected, abs=1.01 * rounded)
    assert f"| {energy(training['energy_wh'])} = {training['seconds']:.1f} s × " in card  # a short run
    assert [energy(value) for value in (0.007142, 9.96, 950, 1234, 1234567)] == [
        *("0.0071 Wh", "10 Wh", "950 Wh", "1.2 kWh", "1,200 kWh")
    ]


def test_the_card_states_that_the_energy_is_that_of_the_last_devices(metadata):
    note = "as if the whole training had used the last number and type of devices."
    metadata["training"]["changes"] = [{"step": 4, "setting": "max_steps", "before": 8, "after": 9}]
    assert note not in render_card(metadata, tiny_config())
    metadata["training"]["changes"] += [{"step": 4, "setting": "world_size", "before": 2, "after": 1}]
    assert note in render_card(metadata, tiny_config())


def test_the_card_states_that_the_counts_are_those_of_the_last_text(metadata):
    note = "Data, verbatim copying, tokens and effective epochs are stated as if the whole training had used the last text."
    metadata["training"]["changes"] = [{"step": 4, "setting": "world_size", "before": 2, "after": 1}]
    assert note not in render_card(metadata, tiny_config())
    metadata["training"]["changes"] += [{"step": 4, "setting": "data", "before": None, "after": None}]
    assert note in render_card(metadata, tiny_config())
    metadata["copying"] = {}
    assert note.replace(" verbatim copying,", "") in render_card(metadata, tiny_config())


def test_the_hub_accepts_the_metadata_of_the_card(metadata, hub):
    metadata |= {"language": ["no", "code"], "license": "cc-by-4.0"}
    metadata["data"]["datasets"] = ["user/plays"]
    card = ModelCard(render_card(metadata, tiny_config()), ignore_metadata_errors=False)
    card.validate()  # asks the Hub
    data = card.data
    assert (data.language, data.license, data.datasets) == (["no", "code"], "cc-by-4.0", ["user/plays"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.widget == [{"text": "def "}]
    metrics = {result.metric_type: result.metric_value for result in data.eval_results}
    assert metrics == {name: round(metadata["results"][name], 4) for name in ("loss", "perplexity", "bits_per_byte")}
    measured = {name: metadata["results"][name] for name in ("block_size", "stride", "tokens", "bytes")}
    assert all(result.metric_args == measured and result.dataset_split == "validation" for result in data.eval_results)
    metadata["license"] = "my-own"
    with pytest.raises(ValueError, match="must be one of"):
        ModelCard(render_card(metadata, tiny_config())).validate()


def test_unstated_settings_are_not_in_the_metadata(metadata):
    metadata |= {"language": [], "license": None, "results": {}}
    metadata["data"]["validation"] = None
    metadata["sample"] |= {"prompt": "", "texts": []}
    card = ModelCard(render_card(metadata, tiny_config()))
    stated = {name: value for name, value in card.data.to_dict().items() if value is not None}
    assert set(stated) == {"library_name", "pipeline_tag", "tags", "co2_eq_emissions"}
    assert "## Evaluation" not in card.text
    assert "## Samples" not in card.text
    assert "| license | not stated |" in card.text
    assert '"<|endoftext|>"' in card.text  # the BOS token, in place of a prompt


def test_a_card_without_scores_does_not_call_the_validation_text_scored(metadata):
    card, without_scores = (render_card(each, tiny_config()) for each in (metadata, metadata | {"results": {}}))
    assert "| validation (scored) |" in card and f"Scored: {metadata['data']['validation']['scored']}." in card
    assert "| validation (not scored) |" in without_scores and "Scored:" not in without_scores


def test_the_card_of_a_mixture_of_streams_does_not_promise_that_its_score_can_be_repeated(metadata):
    metadata["recipe"] |= {"streaming": True, "data": "user/plays:0.5,user/poems:0.5"}
    card = render_card(metadata, tiny_config())
    assert "cannot be reproduced, so `minigpt evaluate … --split validation` rejects it." in card
    assert "may score other excerpts" not in card


def test_no_evaluation_results_are_written_for_a_training_corpus(metadata, tmp_path):
    """The Hub accepts `.eval_results/` only for registered benchmarks, which a training corpus never is."""
    metadata["data"]["datasets"] = ["user/plays"]
    write_model_folder(tmp_path / "model", tiny_model(), character_tokenizer(["ab"]), metadata, [])
    assert not (tmp_path / "model" / ".eval_results").exists()
    assert ModelCard((tmp_path / "model" / "README.md").read_text()).data.eval_results


def test_a_score_of_a_tokenizer_that_loses_text_is_not_comparable_in_the_model_index_either(metadata):
    config, lossy = tiny_config(), "upper case lost or changed"
    for tokenizer, suffix in (({"lossy": lossy}, f" (not comparable: {lossy})"), ({"lossy": None}, "")):
        changed = {**metadata, "tokenizer": {**metadata["tokenizer"], **tokenizer}}
        card = render_card(changed, config)
        assert ("**Not comparable**" in card) == bool(suffix)
        names = {result.dataset_name for result in ModelCard(card).data.eval_results}
        assert names == {f"{metadata['data']['name']}, validation split{suffix}"}


def test_emissions_are_energy_times_the_world_average_in_grams(metadata):
    """The schema of the Hub: https://huggingface.co/docs/hub/model-cards-co2."""
    metadata["training"]["energy_wh"] = 1234.0
    card = ModelCard(render_card(metadata, tiny_config()))
    emissions = card.data.co2_eq_emissions
    assert emissions["emissions"] == 590.0  # 1.234 kWh · 475 g/kWh = 586 g
    assert emissions["training_type"] == "pre-training"
    assert emissions["hardware_used"] == metadata["training"]["device"]
    assert "475 g/kWh" in emissions["source"]
    assert "| estimated emissions | 590 g CO₂eq" in card.text
    metadata["recipe"]["init_from"] = "user/base"
    assert ModelCard(render_card(metadata, tiny_config())).data.co2_eq_emissions["training_type"] == "fine-tuning"


def test_every_dataset_of_a_mixture_is_linked_and_only_if_it_exists_on_the_hub(run_folder, metadata, hub, tmp_path):
    assert hub_datasets("user/plays:0.5,user/absent:lines:0.3,notes.txt:0.2") == ["user/plays", "user/absent"]
    assert hub_datasets("user/plays:lines") == ["user/plays"]
    assert hub_datasets("notes.txt") == hub_datasets("stdlib") == []
    hub.put("user/plays", {"train.txt": b"To be"}, repo_type="datasets")
    hub.put("user/base", {"config.json": b"{}"})
    metadata["data"]["datasets"] = ["user/plays", "user/absent"]
    for base, linked in (("user/base", "user/base"), ("user/gone", None)):
        metadata["recipe"]["init_from"] = base
        folder = tmp_path / base.replace("/", "-")
        write_model_folder(folder, tiny_model(vocab_size=258), byte_tokenizer(), metadata, [])
        push_folder(folder, "user/tuned")
        card = ModelCard(hub.files("user/tuned")["README.md"].decode())
        card.validate()  # asks the Hub
        assert card.data.datasets == ["user/plays"]
        assert (card.data.base_model, card.data.get("base_model_relation")) == (linked, "finetune" if linked else None)
        assert (f"https://huggingface.co/{base}" in card.text) == bool(linked)


@pytest.mark.parametrize("to", ["gguf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_card_of_an_export_names_the_model_on_the_hub_that_was_converted(to, run_folder, hub, tmp_path):
    push_folder(run_folder / "model", "user/tiny")
    snapshot_download("user/tiny", local_dir=tmp_path / "snapshot")
    for folder, base in ((tmp_path / "snapshot", "user/tiny"), (run_folder / "model", None)):
        out = tmp_path / f"{to}-of-{base is None}"
        export_model(folder, out, to, context=32)
        card = ModelCard.load(out / "README.md")
        card.validate()  # asks the Hub
        relation = "quantized" if base else None
        assert (card.data.base_model, card.data.get("base_model_relation")) == (base, relation)
        assert card.data.library_name == {"gguf": "gguf", "onnx": "transformers.js"}[to]
        assert all(name in card.text for name in re.findall(r"`([^`]+\.(?:gguf|onnx|py))`", card.text))


def test_the_card_of_an_export_names_the_branch_that_was_converted(run_folder, hub, tmp_path):
    push_folder(run_folder / "model", "user/tiny", "v2")
    snapshot_download("user/tiny", revision="v2", local_dir=tmp_path / "snapshot")
    export_model(tmp_path / "snapshot", tmp_path / "out", "gguf", context=32)
    link = "[user/tiny/tree/v2](https://huggingface.co/user/tiny/tree/v2), converted by minigpt-hf."
    assert link in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("init_from", ["Qwen/Qwen3-0.6B", "user/tiny_model.v2"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_card_of_a_fine_tuned_model_names_its_base_model(init_from, lora_rank, metadata, hub):
    """A merged LoRA model contains all weights, so it is a fine-tune and not an adapter."""
    metadata["recipe"] |= {"init_from": init_from, "lora_rank": lora_rank}
    card = ModelCard(render_card(metadata, tiny_config()))
    card.validate()  # asks the Hub
    assert (card.data.base_model, card.data.base_model_relation) == (init_from, "finetune")
    assert "from-scratch" not in card.data.tags
    assert "trained from scratch" not in card.text
    assert f"fine-tuned from [`{init_from}`](https://huggingface.co/{init_from})" in card.text


def test_the_card_of_a_fine_tuned_model_states_what_its_score_was_compared_with(metadata):
    limit = "Whether the base model was trained on a part of it, or on it within another text, is not known."
    assert limit not in render_card(metadata, tiny_config())
    metadata["recipe"]["init_from"], metadata["data"]["compared_with_base_model"] = "model", False
    card = render_card(metadata, tiny_config())
    assert limit not in card and "was not compared with the training text of the base model" in card
    metadata["data"]["compared_with_base_model"] = True
    assert limit in render_card(metadata, tiny_config())
    metadata["data"]["unseen_fraction"] = 0.05
    card = render_card(metadata, tiny_config())
    assert limit not in card and "**Not a score of unseen text**" in card


@pytest.mark.parametrize("init_from", ["model", "/home/me/model", "../model", "runs/bard/model", "C:\\models\\bard"])
def test_a_local_base_model_is_not_published(init_from, metadata):
    metadata["recipe"] |= {"init_from": init_from}
    card = ModelCard(render_card(metadata, tiny_config()))
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert "trained from scratch" not in card.text
    assert "fine-tuned from an existing model" in card.text


def test_a_model_trained_from_scratch_has_no_base_model(metadata):
    card = ModelCard(render_card(metadata, tiny_config()))
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert "from-scratch" in card.data.tags
    assert "trained from scratch" in card.text


def test_the_sections_of_the_card_have_standard_names(card):
    assert headings(card)[1:] == [
        "## Usage",
        "## Samples",
        "### Verbatim copying",
        "## Model",
        "## Data",
        "## Training",
        "## Evaluation",
        "## Limitations and risks",
        "## Reproduce",
    ]


@pytest.mark.parametrize("name", ["training", "recipe", "tokenizer", "license", "sample", "torch"])
def test_missing_metadata_is_an_error(name, metadata):
    del metadata[name]
    with pytest.raises((jinja2.UndefinedError, KeyError), match=name):
        render_card(metadata, tiny_config())


ESCAPES = "```\n# not a heading\n````\n<script>alert(1)</script>\x1b[2J\u202e {{ 7 * 7 }} | `a` |"


def test_text_cannot_escape_from_its_code_block(metadata):
    plain = render_card(metadata, tiny_config())
    metadata["sample"] |= {"prompt": ESCAPES, "texts": [ESCAPES, "~~~\n---\n```"]}
    metadata["data"]["name"] = metadata["recipe"]["sample_prompt"] = ESCAPES
    metadata["recipe"]["data"] = "a\n```\n# b"
    card = render_card(metadata, tiny_config())
    assert headings(card) == headings(plain)
    assert not re.search("[\x1b\u202e]", card)
    assert f"generator({literal(ESCAPES)}" in blocks(card, "python")[1]
    assert eval(literal(ESCAPES)) == ESCAPES
    assert subprocess.check_output(["bash", "-c", f"printf %s {shell(ESCAPES)}"], text=True) == ESCAPES


def headings(card: str) -> list[str]:
    """Headings according to CommonMark: a fence is closed by at least as many marks as opened it."""
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


def test_code_fences_are_longer_than_any_in_the_text():
    assert code("a`b|c\nd") == "``a`b|c d``"
    assert cell("a`b|c\nd") == "``a`b\\|c d``"  # GitHub divides cells before it reads code
    assert code("def ") == "` def  `"  # CommonMark strips one space on either side
    assert fenced("a\n````\nb") == "`````text\na\n````\nb\n`````"


def test_line_ends_of_windows_in_samples_are_not_shown_as_replaced_characters():
    assert fenced("<p>\r\n\r</p>\r\n") == "```text\n<p>\n\N{REPLACEMENT CHARACTER}</p>\n\n```"


def test_verbatim_copying_is_not_stated_for_samples_shorter_than_the_stretches_it_counts(metadata):
    for tokens, is_stated in ((7, False), (8, True)):
        stretches = [{"tokens": 3, "text": "abc", "of_tokens": tokens}, {"tokens": 0, "text": "", "of_tokens": 0}]
        text = render_card({**metadata, "copying": {**metadata["copying"], "stretches": stretches}}, tiny_config())
        assert ("### Verbatim copying" in text) == ("(#verbatim-copying)" in text) == is_stated
    for missing in ({**metadata, "copying": {}}, {name: metadata[name] for name in metadata if name != "copying"}):
        assert "copying" not in render_card(missing, tiny_config()).partition("## Model")[0]
