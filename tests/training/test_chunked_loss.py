"""Cross-entropy in chunks: value and gradients, the size of the largest tensor, and training with it."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_hf.cli import main
from minigpt_hf.training import trainer
from minigpt_hf.training.chunked_loss import chunked_cross_entropy
from tests.conftest import representative
from tests.training.conftest import assert_equal, go_back, rows, state_of, train

TOKENS, WIDTH, VOCABULARY = 37, 8, 101


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[[0, 17, 36]] = -100
    labels[5] = VOCABULARY - 1
    return states, weight, labels


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 1000])
def test_value_and_gradients_are_those_of_cross_entropy(chunk_size):
    losses, gradients = [], []
    for is_chunked in (True, False):
        states, weight, labels = inputs()
        if is_chunked:
            loss = chunked_cross_entropy(states, weight, labels, 1 / 34, chunk_size)
        else:
            loss = cross_entropy(states @ weight.T, labels)  # 34 of 37 labels count
        (3 * loss).backward()  # a factor, as with gradient accumulation
        losses.append(loss)
        gradients.append((states.grad, weight.grad))
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_scores_beyond_the_range_of_exp_give_a_finite_loss():
    states, weight, labels = inputs()
    loss = chunked_cross_entropy(1e4 * states, weight, labels, 1.0, 10)
    torch.testing.assert_close(loss, cross_entropy(1e4 * states @ weight.T, labels, reduction="sum"))
    assert math.isfinite(loss.item())


def test_under_autocast_products_are_rounded_but_the_loss_is_float32():
    states, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(states, weight, labels, 1.0, 10)
    loss.backward()
    logits = (states.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(loss, cross_entropy(logits, labels, reduction="sum"), atol=0, rtol=1e-6)
    assert loss.dtype == states.grad.dtype == weight.grad.dtype == torch.float32
    exact, exact_weight, _ = inputs()
    cross_entropy(exact @ exact_weight.T, labels, reduction="sum").backward()
    torch.testing.assert_close(states.grad, exact.grad, atol=0.05, rtol=0.05)
    assert not torch.equal(states.grad, exact.grad)


class Largest(TorchDispatchMode):
    """Records the largest number of rows, of V elements each, of the tensors that operations return."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def test_no_tensor_has_the_logits_of_all_tokens():
    for chunk_size, rows_expected in ((10, 10), (TOKENS, TOKENS)):
        states, weight, labels = inputs()
        with Largest(VOCABULARY) as largest:
            chunked_cross_entropy(states, weight, labels, 1.0, chunk_size).backward()
        assert largest.rows == max(rows_expected, WIDTH)  # the transposed weight has WIDTH rows


@pytest.mark.parametrize("flags", [[], ["--mtp_loss_weight", "0.5"]])
def test_no_tensor_has_the_logits_of_a_batch_from_the_plan_to_the_end_of_training(recipe, words, tmp_path, flags):
    """A batch has 4 · 16 tokens; `bytes` has 258."""
    flags = [*flags, "--per_device_train_batch_size", "4", "--max_steps", "2"]
    found = []
    for size in ("7", "0"):
        with Largest(258) as largest:
            assert train(recipe, words, tmp_path / size, *flags, "--logits_chunk_size", size) == 0
        found.append(largest.rows)
    assert found == [32, 64]  # the transposed head has a row per element of the hidden states


@pytest.mark.parametrize("size", ["7", "0"])
def test_with_bf16_the_heads_run_under_autocast(recipe, words, tmp_path, monkeypatch, size):
    """Accelerate enables autocast in `forward` of the model only."""
    dtypes = []

    def recorded(function):
        def wrapper(*args):
            dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return function(*args)

        return wrapper

    for name in ("chunked_cross_entropy", "add_auxiliary_loss"):
        monkeypatch.setattr(trainer, name, recorded(getattr(trainer, name)))
    assert train(recipe, words, tmp_path / "run", *MTP, "--bf16", "--logits_chunk_size", size, "--max_steps", "2") == 0
    assert {*dtypes} == {torch.bfloat16}


MTP = ["--mtp_loss_weight", "0.5"]


@pytest.mark.parametrize("flags", representative([[], MTP, ["--gradient_accumulation_steps", "2"]], MTP))
def test_training_in_chunks_gives_the_same_losses(recipe, words, tmp_path, flags):
    logs = []
    for size in ("0", "7"):
        run = tmp_path / size
        assert train(recipe, words, run, "--no_muon", *flags, "--logits_chunk_size", size) == 0
        logs.append([row[name] for row in rows(run) for name in ("loss", "grad_norm")])
    assert len(logs[0]) == 16
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_training_in_chunks_resumes_exactly(recipe, words, tmp_path):
    flags = [*MTP, "--logits_chunk_size", "7"]
    assert train(recipe, words, tmp_path / "whole", *flags) == 0
    go_back(tmp_path / "whole", tmp_path / "resumed", 4)
    assert train(recipe, words, tmp_path / "resumed", *flags) == 0
    assert_equal(*(state_of(tmp_path / name / "checkpoint-8") for name in ("whole", "resumed")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "logits_chunk_size is not supported with label_smoothing_factor"),
        (["--lora_rank", "2", "--no_muon", "--init_from", "x"], "logits_chunk_size is not supported with lora_rank"),
        (["--logits_chunk_size", "-1"], "logits_chunk_size is -1: it must be at least 0"),
    ],
)
def test_settings_that_exclude_chunks_are_rejected(flags, message, words, tmp_path, capsys):
    argv = ["train", "--data", str(words), "--output_dir", str(tmp_path / "run"), "--logits_chunk_size", "7", *flags]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_deepspeed_requested_by_the_launcher_excludes_chunks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch` does
    assert main(["train", "--output_dir", str(tmp_path / "run"), "--logits_chunk_size", "7"]) == 2
    assert "logits_chunk_size is not supported with deepspeed: omit one of them" in capsys.readouterr().err
