"""The benchmarks: times and ratios compared with manual calculations, losses with those of `minigpt train`."""

import argparse
import json
import sys
from importlib import import_module

import benchmark
import datasets
import pytest
import torch
import yaml
from benchmarks import ablation, attention, busy, data, hf_peer, learn, nanogpt, scaling, throughput, trial
from benchmarks.process import timed
from transformers import AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.chat_format import ChatFormat, with_chat_tokens
from minigpt_hf.data.conversations import messages_of
from minigpt_hf.data.stream import TokenStream
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer
from minigpt_hf.training.recipe import parse_arguments
from tests.conftest import random_ids, tiny_model


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_every_benchmark_has_a_description_and_options(name):
    module = import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.__doc__
    assert callable(module.run)


def test_help_and_an_unknown_name_list_the_benchmarks(capsys):
    assert benchmark.main(["unknown"]) == 2
    assert benchmark.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in benchmark.BENCHMARKS)


def test_a_list_of_rows_is_printed_as_a_table(capsys):
    benchmark.print_results(
        {"ratio": 1.5, "steps": [{"training": "minigpt", "seconds": 9.5}, {"training": "nanoGPT", "seconds": None}]}
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].split() == ["ratio", "1.5"]
    assert lines[1:] == ["steps", "  training  seconds", "  minigpt       9.5", "  nanoGPT          "]


def test_a_process_is_timed_and_a_failure_is_reported():
    process = timed([sys.executable, "-c", "sum(range(3_000_000)); print('done')"])
    assert process.output == "done\n"
    assert process.cpu_seconds > 0
    assert process.megabytes > 1
    with pytest.raises(RuntimeError, match="exit code 3:\nerror message"):
        timed([sys.executable, "-c", "import sys; print('error message'); sys.exit(3)"])


def test_the_share_of_the_quiet_speed_is_a_median_of_ratios_within_a_round():
    speeds = {("default", 0): [100, 200, 100], ("default", 1): [50, 50, 40], ("passive", 0): [90, 180, 90]}
    speeds["passive", 1] = [45, 45, 63]
    assert busy.table(speeds) == [
        {"policy": "default", "quiet_tokens_per_second": 100, "quiet_relative": 1.0, "share_at_1_per_core": 0.4},
        {"policy": "passive", "quiet_tokens_per_second": 90, "quiet_relative": 0.9, "share_at_1_per_core": 0.5},
    ]


def test_busy_loops_end_with_the_measurement():
    with busy.busy_loops(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_trial_equals_that_of_the_trainer(run_folder, recipe_file, text_file):
    loss = trial.prepare(str(recipe_file), ["--data", str(text_file)]).run()
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert loss == pytest.approx([row["eval_loss"] for row in rows if "eval_loss" in row][-1], rel=1e-9)


def test_an_ablation_reports_differences_from_the_recipe_and_reuses_its_log(recipe_file, text_file, tmp_path):
    parser = argparse.ArgumentParser()
    ablation.add_arguments(parser)
    names = ["unchanged", "residual projections zero", "same offset in every epoch"]
    names += ["half the batch size, twice the steps"]
    argv = ["--data", str(text_file), "--recipe", str(recipe_file), "--seeds", "3", "4", "--max_steps", "2"]
    argv += ["--log", str(tmp_path / "log"), "--only", *names]
    table = ablation.run(parser.parse_args(argv))["ablation"]
    assert [row["change"] for row in table] == names
    assert len({row["loss"] for row in table}) == 4
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    means = [sum(row["loss"] for row in log if row["change"] == name) / 2 for name in names]
    assert [row["loss"] for row in table] == [f"{mean:.4f}" for mean in means]
    assert [row["difference"] for row in table] == [f"{mean - means[0]:+.4f}" for mean in means]
    (tmp_path / "log").write_text("".join(json.dumps({**row, "loss": 1.0}) + "\n" for row in log))
    assert {row["loss"] for row in ablation.run(parser.parse_args(argv))["ablation"]} == {"1.0000"}


@pytest.mark.parametrize("heads", [2, 8])
def test_another_number_of_heads_applies_to_a_recipe_of_one_layer_with_positional_heads(heads, text_file):
    change = ablation.CHANGES[f"{heads} attention heads"]
    model = trial.prepare("shakespeare-char-fast", ["--data", str(text_file), *change.flags]).model
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (1, heads)


@pytest.mark.parametrize(
    ("name", "standard_deviations"),
    [
        ("embedding std 0.08", (0.08, 0.02 / 2)),
        ("residual projections zero", (0.02, 0.0)),
        ("residual projections unscaled", (0.02, 0.02)),
    ],
)
def test_changed_initializations_have_the_standard_deviations_they_name(
    name, standard_deviations, recipe_file, text_file
):
    change = ablation.CHANGES[name]
    model = trial.prepare(str(recipe_file), ["--data", str(text_file)], initialize=change.initialize).model.model
    layer = model.layers[0]  # L = 2: residual projections have 0.02 / √(2L) = 0.01 by default
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(standard_deviations[1], rel=0.1)
    assert model.embed_tokens.weight[2:].std().item() == pytest.approx(standard_deviations[0], rel=0.1)


def test_scaling_changes_one_learning_rate_at_a_time(recipe_file, text_file):
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    argv = [
        "--data",
        str(text_file),
        "--recipe",
        str(recipe_file),
        "--widths",
        "16",
        "--factors",
        "3",
        "--max_steps",
        "2",
    ]
    results = scaling.run(parser.parse_args(argv))
    rates = [rate for row in results["scaling"] for rate in (row["Muon"], row["AdamW"])]
    assert rates == pytest.approx([0.02, 4e-3, 0.06, 4e-3, 0.02, 12e-3])
    losses = [float(row["loss"]) for row in results["scaling"]]
    assert results["width_16_recipe_minus_best"] == pytest.approx(losses[0] - min(losses), abs=2e-4)


# -- times and ratios -------------------------------------------------------------------------------------------------


def test_the_step_timer_times_every_optimizer_step_and_excludes_warmup():
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with throughput.time_optimizer_steps() as timer:
        for _ in range(3):
            optimizer.step()
    optimizer.step()
    assert len(timer.starts) == len(timer.ends) == 3
    timer.starts = [float(i) for i in range(throughput.WARMUP)] + [100.0, 102.0]
    timer.ends = [(i + 0.5, i + 0.1) for i in range(throughput.WARMUP)] + [(100.5, 20.0), (103.5, 21.1)]
    assert timer.seconds == pytest.approx((103.5 - 9.5) / 2)
    assert timer.cpu_seconds == pytest.approx((21.1 - 9.1) / 2)
    assert timer.optimizer_share == pytest.approx((0.5 + 1.5) / 2 / 47)


def test_the_time_of_training_steps_excludes_evaluations():
    output = "step 0: train loss 4.2, val loss 4.3\niter 0: loss 4.2, time 9000.00ms, mfu -100.00%\n"
    output += "iter 1: loss 4.0, time 30.00ms, mfu -100.00%\niter 2: loss 3.9, time 50.00ms, mfu 0.02%\n"
    assert learn.seconds_of_nanogpt(output, 3) == pytest.approx(3 * 0.040)
    log = [{"step": 10, "tokens": 1000, "tokens_per_second": 500}, {"step": 10, "tokens": 1000, "eval_loss": 2.0}]
    log += [{"step": 20, "tokens": 2000, "tokens_per_second": 250}]
    assert learn.seconds_of_log("\n".join(map(json.dumps, log)), 21) == pytest.approx((2 + 4) * 21 / 20)


@pytest.mark.parametrize("peer", learn.RUNS)
def test_only_the_first_run_of_minigpt_reads_as_many_tokens_as_the_peer(peer):
    tokens = []
    for recipe, settings in learn.RUNS[peer].values():
        data, _, training = parse_arguments(["--output_dir", "unused", *learn.flags(settings)], recipe)
        tokens.append(training.max_steps * training.per_device_train_batch_size * data.block_size)
    assert tokens[0] == learn.STEPS * learn.TOKENS_PER_STEP
    assert max(tokens[1:]) < tokens[0] / 4


def test_ratios_are_medians_over_rounds_and_losses_are_means():
    def row(loss, seconds, tokens=100):
        times = {"training_seconds": seconds, "process_seconds": seconds + 10, "cpu_seconds": seconds}
        return {"parameters": 7, "tokens": tokens, **times, "loss": loss}

    rows = {
        "peer": [row(1.9, 60), row(1.9, 90), row(1.9, 30)],
        "minigpt": [row(1.5, 10, 20), row(1.6, 30, 20), row(1.7, 10, 20)],
    }
    results = learn.compare(rows)
    assert results["trainings"][1]["loss"] == "1.6000"
    assert results["trainings"][1]["range"] == "0.2000"
    (ratio,) = results["peer_over_minigpt"]
    assert (ratio["loss_difference"], ratio["tokens_ratio"]) == ("-0.3000", 5.0)
    assert ratio["training_seconds_ratio"] == 3.0  # the median of 6, 3 and 3
    assert ratio["process_seconds_ratio"] == 2.5  # of 70/20, 100/40 and 40/20


# -- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_peers_have_as_many_parameters_as_the_recipe(architecture):
    size = hf_peer.make_model(architecture, "tuned", 67).num_parameters()
    assert 800_512 * 0.99 < size < 800_512 * 1.02


def test_group_texts_concatenates_texts_and_splits_them_into_sequences():
    rows = {"input_ids": [list(range(50)), list(range(50, 200))]}
    sequences = hf_peer.group_texts(rows)
    assert sequences["input_ids"] == sequences["labels"] == [list(range(i, i + 64)) for i in (0, 64, 128)]


def test_the_data_benchmark_tokenizes_the_same_text_in_every_case(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    lines, size = ["four score\n", "and seven years ago\n"], 4000
    tokens = {}
    for name, file_bytes, files in (("one file", size, 1), ("files", 500, 8), ("one line", None, 1)):
        data.write_files(tmp_path / name, lines, size, file_bytes)
        written = list((tmp_path / name).rglob("*.txt"))
        assert (len(written), sum(file.stat().st_size for file in written)) == (files, size)
        tokens[name] = data.stream_of(tmp_path, tmp_path / "cache", name, byte_tokenizer(), 1)
        assert tokens[name] == size + files  # bytes, and the token before each document
    theirs = data.run_clm(tmp_path, tmp_path / "cache", "one file", byte_tokenizer(), 1)
    assert size - 2 * data.BLOCK_SIZE < theirs <= size
    byte_level_bpe([lines[0]], 300).save_pretrained(tmp_path / "tokenizers" / "bpe")
    one, two = (data.shards(tmp_path, tmp_path / str(count), "files", None, count) for count in (1, 2))
    assert one == two > 8
    assert not any("," in name for name in data.CASES)  # `--cases` is separated by commas


def test_an_unknown_case_of_the_data_benchmark_is_rejected_before_anything_is_written():
    with pytest.raises(SystemExit, match="unknown case 'two shards'; give one or several of run_clm, "):
        data.run(argparse.Namespace(cases="one shard,two shards"))


def test_ratios_of_the_data_benchmark_are_those_within_a_round():
    """Medians of 2, 4 and 9 times the throughput; the machine is slower in later rounds."""
    case = {"megabytes": 1.0, "seconds": 1.0, "cpu_seconds": 1.0, "peak_megabytes": 5.0}
    rounds = [
        {"run_clm": {**case, "seconds": slow}, "one file": {**case, "megabytes": 2.0, "seconds": 2 * slow / ratio}}
        for slow, ratio in ((1, 2), (5, 9), (10, 4))
    ]
    row = data.row("one file", rounds)
    assert (row["ratio_by_time"], row["ratio_by_CPU_time"], row["seconds"], row["peak_MB"]) == (4.0, 2.0, 1.11, 5)


def test_fixed_offset_sequences_are_the_same_in_every_epoch(tmp_path):
    stream = TokenStream(tmp_path, torch.arange(100).numpy(), torch.zeros(1).numpy(), 0, 99, 100, 100, "")
    fixed, shifted = ablation.FixedOffsetSequences(stream, 8, seed=0), SequenceDataset(stream, 8, seed=0)
    assert [fixed[epoch, 0]["input_ids"][0] for epoch in range(3)] == [0, 0, 0]
    assert len({int(shifted[epoch, 0]["input_ids"][0]) for epoch in range(3)}) > 1


def test_a_clone_is_copied_without_its_outputs(tmp_path):
    clone, text = tmp_path / "clone", tmp_path / "text.txt"
    (clone / nanogpt.DATA).mkdir(parents=True)
    for name in ("train.py", nanogpt.DATA / "prepare.py", nanogpt.DATA / "train.bin"):
        (clone / name).write_text(str(name))
    text.write_text("a text")
    nanogpt.copy(clone, text, tmp_path / "copy")
    names = {file.name for file in (tmp_path / "copy").rglob("*.*")}
    assert names == {"train.py", "prepare.py", "requests.py", "input.txt"}
    with pytest.raises(SystemExit, match=r"has no train\.py"):
        nanogpt.copy(tmp_path, text, tmp_path / "other")


# -- attention --------------------------------------------------------------------------------------------------------


def test_the_attention_of_an_untrained_model_is_the_same_before_and_after(recipe_file, text_file, tmp_path):
    settings = yaml.safe_load(recipe_file.read_text()) | {"block_size": 32, "rope_theta": 1000.0}
    recipe = tmp_path / "positional.yaml"
    recipe.write_text(yaml.safe_dump(settings | {"positional_heads": [[1, 3], [2]], "num_attention_heads": 2}))
    argv = ["--recipe", str(recipe), "--data", str(text_file), "--seed", "3"]
    frozen = [
        "--max_steps",
        "1",
        "--learning_rate",
        "0",
        "--muon_learning_rate",
        "0",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *argv, *frozen]) == 0
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    argv += ["--model", str(tmp_path / "run" / "model"), "--figure", str(tmp_path / "attention.svg")]
    rows = attention.run(parser.parse_args(argv))["attention"]
    assert [(row["layer"], row["head"], row["distance"]) for row in rows] == [(0, 0, 1), (0, 1, 3), (1, 0, 2)]
    for row in rows:
        assert row["before"] == row["after"]
        assert 0.3 < float(row["before"]) < 1
    assert (tmp_path / "attention.svg").stat().st_size > 1000


def test_attention_by_distance_is_the_mean_of_the_diagonals():
    model, ids = tiny_model(attn_implementation="eager"), random_ids(2, 24)
    found = attention.attention_by_distance(model.eval(), ids)
    weights = model(ids, output_attentions=True).attentions[1]
    pairs = [weights[b, 1, t, t - 5].item() for b in range(2) for t in range(attention.CONTEXT, 24)]
    assert found[1, 1, 5].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_the_chat_benchmark_counts_the_tokens_of_conversations_and_starts_at_the_loss_of_the_model(
    run_folder, tmp_path, capsys
):
    rows = [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(30)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["chat", "--data", file, "--model", run_folder / "model", "--conversations", 20, "--rounds", 1]
    assert benchmark.main([str(word) for word in [*argv, "--block_size", 64, "--batch_size", 2, "--json"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["conversations"] == 20
    tokenizer = with_chat_tokens(AutoTokenizer.from_pretrained(run_folder / "model"))
    chat_format = ChatFormat(tokenizer)
    encoded = [chat_format.encode(messages_of(row)) for row in rows[:20]]
    assert result["tokens"] == sum(len(ids) - 2 for ids in encoded)
    assert result["training"][0]["rows"] == "packed" and result["training"][0]["loss_before_training"] > 0


@pytest.mark.slow
def test_the_copying_benchmark_searches_the_text_repeated_to_each_length(text_file, capsys):
    argv = ["copying", "--data", str(text_file), "--tokenizers", "bytes", "--tokens", "50000", "150000", "--json"]
    assert benchmark.main(argv) == 0
    short, long = json.loads(capsys.readouterr().out)["copying"]
    assert (short["tokens"], long["tokens"]) == ("50,000", "150,000")
    assert 0 < short["longest"] <= long["longest"]
    assert short["peak MB"] > 0 and short["CPU seconds"] > 0
