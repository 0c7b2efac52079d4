"""The command line: each verb does its work, and bad input gets one line and exit code 2."""

import json
import re

import pytest

from minigpt_hf.cli import VERBS, main


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# -- what works -------------------------------------------------------------------------------------------------------


def test_a_trained_folder_evaluates_to_the_figures_it_was_published_with(run_folder, text_file, capsys):
    folder = run_folder / "model"
    code, out, _ = run(capsys, "evaluate", folder, "--data", text_file, "--split", "validation", "--json")
    results = json.loads((folder / "minigpt.json").read_text())["results"]
    score = json.loads(out)
    assert code == 0
    assert score["loss"] == pytest.approx(results["loss"], rel=1e-6)
    assert {name: score[name] for name in ("tokens", "bytes", "block_size")} == {
        name: results[name] for name in ("tokens", "bytes", "block_size")
    }


def test_evaluate_prints_the_same_figures_in_words_and_splits_add_up(run_folder, text_file, text, capsys):
    folder = run_folder / "model"
    sizes = []
    for split in ("train", "validation", "all"):
        code, out, _ = run(capsys, "evaluate", folder, "--data", text_file, "--split", split)
        assert code == 0
        assert re.search(r"loss +\d\.\d{4} nats per token\n", out)
        sizes.append(int(re.search(r"([\d,]+) bytes", out)[1].replace(",", "")))
    assert sizes[0] + sizes[1] == sizes[2] == len(text.encode())


def test_generate_streams_the_text_of_generate_and_repeats_with_a_seed(run_folder, capsys):
    folder = run_folder / "model"
    argv = ("generate", folder, "--prompt", "def ", "--max_new_tokens", 20)
    texts = [run(capsys, *argv, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    # Streamed or not, it is the same text.
    code, several, _ = run(capsys, *argv, "--seed", 1, "--num_return_sequences", 2)
    assert code == 0
    assert several.count("\n---\n") == 2
    greedy = [run(capsys, *argv, "--do_sample", "false", *more)[1] for more in ([], ["--num_beams", 1])]
    assert greedy[0] == greedy[1]


def test_generate_without_a_prompt_begins_a_document(run_folder, capsys):
    code, out, _ = run(capsys, "generate", run_folder / "model", "--max_new_tokens", 12, "--seed", 3)
    assert code == 0
    assert out.strip()
    assert "<|endoftext|>" not in out


def test_interactive_answers_line_after_line(run_folder, capsys, monkeypatch):
    lines = iter(["def ", "class "])

    def next_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    code, out, err = run(capsys, "generate", run_folder / "model", "--interactive", "--max_new_tokens", 5)
    assert code == 0
    assert out.startswith("def ")
    assert "\nclass " in out
    assert "Ctrl-D" in err


def test_training_says_its_plan_then_lines_then_where_the_model_is(recipe_file, text_file, tmp_path, capsys):
    code, out, err = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *("--max_steps", 8, "--logging_steps", 2, "--tokenizer", "characters", "--eval_steps", 4, "--save_steps", 4),
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["device", "text", "model", "training", "time"]
    assert "8 steps of 128 tokens = 1,024 tokens" in lines[3]
    assert len(re.findall(r"^step \d/8   loss .* bits/byte   lr .* tokens/s .* left$", out, re.MULTILINE)) == 4
    assert re.findall(r"^step (\d)/8   validation loss", out, re.MULTILINE) == ["4", "8"]
    assert [when in out for when in ("before training", "after 4 steps", "after training")] == [True] * 3
    assert lines[-1] == f"the model is in {tmp_path / 'run' / 'model'}"


def test_without_validation_the_last_weights_are_published(recipe_file, text_file, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--validation_fraction", 0, "--tokenizer", "bytes"),
    )
    assert code == 0
    assert "validation loss" not in out
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"] == {}


def test_a_sample_prompt_in_another_alphabet_gives_way(recipe_file, tmp_path, capsys):
    text = tmp_path / "greek.txt"
    text.write_text("μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος\n" * 30, encoding="utf-8-sig")  # with the mark of some editors
    code, out, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text, "--output_dir", tmp_path / "run"),
        *("--max_steps", 2, "--logging_steps", 1, "--tokenizer", "characters"),
    )
    assert code == 0
    assert "samples begin a document: the prompt has a character that this model's tokenizer does not know: 'd'" in out
    assert "\ufeff" not in (tmp_path / "run" / "model" / "tokenizer.json").read_text(encoding="utf-8")
    latin = tmp_path / "latin.txt"
    latin.write_text("arma virumque cano")
    code, _, err = run(capsys, "evaluate", tmp_path / "run" / "model", "--data", latin)
    assert (code, err.count("\n")) == (2, 1)
    assert "the text has a character that this model's tokenizer does not know: 'a' (U+0061)" in err


def test_an_existing_tokenizer_can_be_used(recipe_file, run_folder, text_file, tmp_path, capsys):
    code, _, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run"),
        *("--max_steps", 1, "--logging_steps", 1, "--tokenizer", run_folder / "model"),
    )
    assert code == 0
    written = (tmp_path / "run" / "model" / "tokenizer.json").read_text()
    assert written == (run_folder / "model" / "tokenizer.json").read_text()


def test_epochs_that_are_asked_for_are_not_cut_short_by_the_recipes_steps(recipe_file, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("a line of text to learn\n" * 40)
    code, out, _ = run(
        capsys,
        *("train", "--recipe", recipe_file, "--data", text, "--output_dir", tmp_path / "run"),
        *("--num_train_epochs", 2, "--tokenizer", "bytes", "--logging_steps", 1),
    )
    assert code == 0
    blocks = (864 + 1) // 32  # nine tenths of 960 bytes, and the E
    assert f"{2 * -(-blocks // 4)} steps of 128 tokens" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    try:
        code = main([verb, "--help"])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert code == 0
    assert out.startswith(f"usage: minigpt {verb}")


def test_the_help_of_train_names_every_flag_and_the_recipes(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for flag in (
        "--recipe",
        "shakespeare-char",
        "--data",
        "--hidden_size",
        "--muon",
        "--no_muon",
        "--learning_rate",
        "--fsdp",
    ):
        assert flag in out


def test_help_version_and_no_verb(capsys):
    from minigpt_hf import __version__

    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "--version")[1] == f"minigpt {__version__}\n"
    code, out, _ = run(capsys)
    assert code == 2
    assert all(verb in out for verb in VERBS)


# -- bad input: one line, exit code 2, nothing lost -------------------------------------------------------------------

BAD = {
    "no such file": (["--data", "absent.txt"], r"absent\.txt: no such file or folder; give a text file"),
    "nothing readable in a folder": (["--data", "folder"], "folder: no text file in this folder"),
    "empty text": (["--data", "empty.txt"], r"empty\.txt: there is no text in it"),
    "shorter than a block": (["--data", "short.txt", "--tokenizer", "bytes"], "less than one block of 32"),
    "not UTF-8": (
        ["--data", "latin.txt"],
        r"latin\.txt: not utf-8 text: byte 0xe9 at position 3; .*--encoding latin-1",
    ),
    "unknown recipe": (
        ["--recipe", "shakespear-char"],
        "unknown recipe 'shakespear-char'; did you mean shakespeare-char",
    ),
    "no such recipe file": (["--recipe", "absent.yaml"], r"recipe absent\.yaml: no such file"),
    "unknown recipe key": (["--recipe", "typo.yaml"], "unknown key 'hiden_size'; did you mean hidden_size"),
    "unknown flag": (["--hiden_size", "8"], "unknown argument --hiden_size; did you mean hidden_size"),
    "a value of the wrong type": (["--max_steps", "many"], "argument --max_steps.*: invalid int value: 'many'"),
    "heads not dividing": (["--hidden_size", "30"], "`hidden_size` 30 does not divide into 4 heads"),
    "zero heads": (["--num_attention_heads", "0"], "`num_attention_heads` is 0"),
    "negative layers": (["--num_hidden_layers", "-1"], "`num_hidden_layers` is -1"),
    "a dropout of 7": (["--attention_dropout", "7"], r"`attention_dropout` is 7\.0: a share"),
    "no steps": (["--max_steps", "0"], "max_steps is 0: give a number of steps"),
    "no accumulation": (
        ["--gradient_accumulation_steps", "0"],
        "gradient_accumulation_steps is 0: it must be at least 1",
    ),
    "a negative learning rate": (["--learning_rate", "-1"], r"learning_rate is -1\.0: it must be at least 0"),
    "an optimizer beside Muon": (["--optim", "sgd"], "optim sgd has no effect beside Muon: add --no_muon"),
    "fp16 without an accelerator": (["--fp16", "true"], "fp16 needs an accelerator"),
    "a language in words": (["--language", "English"], "language 'English': expected an ISO 639 code such as en"),
    "a language that YAML reads as false": (["--recipe", "norwegian.yaml"], "Norwegian is 'no' in quotes"),
    "a licence in words": (["--license", "My own"], "license 'My own': expected a name of the Hub's"),
    "a token": (["--hub_token", "hf_secret"], "hub_token is not taken: log in once with `hf auth login`"),
    "a push of pickles": (
        ["--push_to_hub", "--hub_strategy", "checkpoint"],
        "hub_strategy checkpoint would upload opt",
    ),
    "a negative block": (["--block_size", "-3"], "block_size is -3"),
    "a validation share of 2": (["--validation_fraction", "2"], r"validation_fraction is 2\.0"),
    "too small a vocabulary": (["--vocab_size", "5"], "vocab_size is 5: byte-level BPE needs at least 258"),
    "no such tokenizer": (["--tokenizer", "absent"], "tokenizer absent: cannot be loaded"),
    "an unknown encoding": (["--encoding", "utf-9"], "encoding 'utf-9' is unknown"),
    "a model shorter than its blocks": (["--max_position_embeddings", "8"], "less than --block_size 32"),
    "another run": (
        ["--output_dir", "taken"],
        "taken: holds another run.*; name another folder, or say --fresh",
    ),
    "a folder in use": (["--output_dir", "used"], "used: is not empty"),
    "a file for a folder": (["--output_dir", "text.txt"], r"text\.txt: this is a file"),
}


@pytest.fixture
def workshop(tmp_path, monkeypatch, text):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "text.txt").write_text(text[:20_000])
    (tmp_path / "typo.yaml").write_text("hiden_size: 8\n")
    (tmp_path / "norwegian.yaml").write_text("language: [no]\n")
    for name, file, content in (("taken", "fingerprint.json", '{"seed": 7}'), ("used", "thesis.docx", "precious")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_loses_nothing(case, workshop, recipe_file, capsys):
    flags, message = BAD[case]
    before = content(workshop)
    defaults = {"--recipe": str(recipe_file), "--data": "text.txt", "--output_dir": "new"}
    for flag, value in defaults.items():
        if flag not in flags:
            flags = [*flags, flag, value]
    code, out, err = run(capsys, "train", *flags)
    assert code == 2
    assert re.fullmatch(rf"minigpt train: .*{message}.*\n", err), err
    assert out == ""
    assert content(workshop) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "absent", "--data", "text.txt"], "absent: no model can be loaded"),
        (["evaluate", "MODEL", "--data", "absent.txt"], "no such file or folder"),
        (["evaluate", "MODEL", "--data", "text.txt", "--block_size", "9999"], "windows of 1 to"),
        (["evaluate", "MODEL"], "the following arguments are required: --data"),
        (["generate", "absent"], "absent: no model can be loaded"),
        (["generate", "MODEL", "--top_kk", "5"], "no option 'top_kk'; near: top_k"),
        (["generate", "MODEL", "stray"], "unexpected argument 'stray'"),
        (["generate", "MODEL", "--temperature", "-1"], "temperature"),
        (["generate", "MODEL", "--max_new_tokens", "many"], "generation options cannot be used"),
        (["generate", "RUN"], "this is a run; its model is in"),
        (["evaluate", "MODEL", "--data", "text.txt", "--stride", "0"], "stride is 0"),
        (["evaluate", "MODEL", "--data", "text.txt", "--batch_size", "0"], "batch_size is 0"),
        (
            ["evaluate", "MODEL", "--data", "text.txt", "--split", "validation", "--validation_fraction", "0"],
            "held out",
        ),
    ],
)
def test_the_other_verbs_refuse_in_one_line_too(argv, message, workshop, run_folder, capsys):
    places = {"MODEL": str(run_folder / "model"), "RUN": str(run_folder)}
    argv = [places.get(word, word) for word in argv]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert re.fullmatch(rf"minigpt {argv[0]}: .*{message}.*\n", err), err


def test_an_unknown_verb_is_named(capsys):
    code, _, err = run(capsys, "trian")
    assert (code, err) == (2, "minigpt: unknown verb 'trian'; there are train, evaluate, generate, push\n")


def test_debug_shows_where_an_error_comes_from(workshop):
    with pytest.raises(ValueError, match="no such file"):
        main(["train", "--data", "absent.txt", "--output_dir", "new", "--debug"])
