"""The plan of docs/scale.md, and the simulated data plane."""

import json
import math
import re
from dataclasses import replace

import benchmark
import numpy as np
import pytest
import scale
import simulate_data
from benchmarks import loading
from torch.utils.flop_counter import FlopCounterMode

from minigpt_hf.data import blocks
from tests.conftest import random_ids, tiny_model

INPUTS = scale.Inputs()


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_operations_per_token_are_those_that_torch_counts(monkeypatch):
    """Eager attention computes all T keys of a query; the plan counts the T / 2 of causal attention."""
    shape = (32, 2, 4, 2)
    monkeypatch.setitem(scale.SHAPES, "tiny", shape)
    model = tiny_model(num_key_value_heads=2, attn_implementation="eager")
    ids = random_ids(3, 16)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    inputs = replace(INPUTS, vocab_size=model.config.vocab_size, block_size=16)
    planned = scale.model_of("tiny", inputs)
    attention = 6 * 2 * 4 * 8 * 16  # 6 · layers · heads · head dimension · T
    assert planned.parameters == model.num_parameters()
    assert (planned.flops + attention) * ids.numel() == counter.get_total_flops()


def test_the_shapes_of_the_recipes_have_their_parameters():
    assert scale.model_of("124m", INPUTS).parameters == 123_588_864  # as in recipes/gpt2-124m.yaml


def test_gpu_hours_are_operations_divided_by_the_rate():
    model = scale.Model(parameters=10, flops=989 * 10**9)
    inputs = replace(INPUTS, gpus=100, utilisation=0.5)
    assert model.tokens_per_second(inputs) == pytest.approx(100 * 0.5 * 1000)
    assert model.step_seconds(replace(inputs, batch_tokens=100_000)) == pytest.approx(2)


def test_traffic_of_two_nodes_of_two_gpus_by_hand():
    """One parameter; float32 gradients, bfloat16 gathers."""
    bytes_of = scale.traffic(1, replace(INPUTS, gpus=4, gpus_per_node=2))
    assert bytes_of["DDP"] == pytest.approx((2 * 3 / 4 * 4, 2 * 3 / 4 * 4 / 2, 16))
    assert bytes_of["FSDP"] == pytest.approx((3 / 4 * (4 + 2 * 2), 3 / 4 * (4 + 2 * 2) / 2, 4))
    assert bytes_of["HSDP"] == pytest.approx((1 / 2 * (4 + 2 * 2), 2 * 1 / 2 * 4 / 2, 8))
    assert [between for _, between, _ in scale.traffic(1, replace(INPUTS, gpus=2, gpus_per_node=2)).values()] == [0] * 3


def test_the_intervals_of_young_and_daly_are_near_the_minimum_of_the_expected_time():
    """Daly's model: with exponential failures, a run takes M · exp(R / M) · (exp((τ + δ) / M) − 1) / τ per second of work."""
    cost, mean_time = 5.0, 400.0

    def expected(interval: float) -> float:
        return mean_time * (math.exp((interval + cost) / mean_time) - 1) / interval

    best = min((expected(tenth / 10), tenth / 10) for tenth in range(10, 4000))[1]
    assert scale.daly(cost, mean_time) == pytest.approx(best, abs=0.2)
    assert scale.young(cost, mean_time) == pytest.approx(best, rel=0.1)
    assert scale.daly(900, mean_time) == mean_time


def test_every_table_follows_its_inputs(capsys):
    assert scale.main([]) == 0
    whole = capsys.readouterr().out
    assert re.findall("^## (.*)", whole, re.MULTILINE) == list(scale.TABLES)
    assert scale.main(["compute", "--tokens", "2000000000000"]) == 0
    hours = [re.findall(r"^\| 6b .*", text, re.MULTILINE)[0].split("|")[5] for text in (whole, capsys.readouterr().out)]
    assert int(hours[1].replace(",", "")) == pytest.approx(2 * int(hours[0].replace(",", "")), abs=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be positive"),
        (["--batch_tokens", "100"], "--batch_tokens 100: less than one sequence of --block_size 4096"),
        (["--model", "7t"], "invalid choice: '7t'"),
    ],
)
def test_impossible_inputs_are_rejected_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scale.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_measured_rate_is_compared_with_the_required_one(monkeypatch, capsys):
    monkeypatch.setattr(loading, "TOKENS", 1 << 18)
    assert benchmark.main(["loading", "--repeats", "1", "--sequences", "20", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["one_core"] for row in results["rates"]] == ["addresses", "sequences read", "sequences in batches"]
    row = results["sequences_per_second"][0]
    required, measured = (float(row[name].replace(",", "")) for name in ("required_per_GPU", "measured_per_core"))
    assert required == pytest.approx(scale.required_rate("124m", INPUTS), abs=0.01)
    assert float(row["share_of_a_core"].rstrip("%")) == pytest.approx(100 * required / measured, abs=0.02, rel=0.02)


# -- the data plane ---------------------------------------------------------------------------------------------------

SMALL = "--ranks 8 --steps 50 --block_size 16 --shards 9 --workers 2 --sample 50".split()


@pytest.mark.parametrize("flags", [[], ["--shuffle_window", "64"], ["--batch_size", "3"]])
def test_the_simulated_run_loses_and_repeats_no_token(flags, capsys):
    assert simulate_data.main([*SMALL, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("verified")]) == 7
    assert not any("FAILED" in line for line in lines)


def test_the_simulation_detects_an_order_that_repeats_a_sequence(capsys, monkeypatch):
    real = blocks.permute
    monkeypatch.setattr(blocks, "permute", lambda positions, *args: np.maximum(real(positions, *args), 1))
    assert simulate_data.main(SMALL) == 1
    assert "FAILED    all 400 addresses: 399 sequences are used" in capsys.readouterr().out


def test_the_simulation_detects_ranks_that_omit_a_sequence(capsys, monkeypatch):
    """From the second phase on, the ranks skip a sequence that no other rank uses."""
    real = simulate_data.SequenceSampler.indices

    def shifted(self, begin, end):
        return real(self, begin + (self.num_ranks == 8), end + (self.num_ranks == 8))

    monkeypatch.setattr(simulate_data.SequenceSampler, "indices", shifted)
    assert simulate_data.main(SMALL) == 1
    assert "FAILED" in capsys.readouterr().out
