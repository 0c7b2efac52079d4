"""What training asks of a model: memory savers, compilation, half precision, losses, odd ways of loading and saving."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM
from transformers.trainer_pt_utils import LabelSmoother

from minigpt_hf import MiniGPTForCausalLM
from tests.conftest import random_ids, tiny_model

STAY = ["model.embed_tokens", "model.dropout", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture
def mixed() -> MiniGPTForCausalLM:
    """Its first layer sees everything, its second a window of eight tokens; nothing compiled is left over."""
    torch._dynamo.reset()
    yield tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    torch._dynamo.reset()


# -- memory and speed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_recomputed_and_give_equal_gradients(reentrant):
    ids, gradients, passes = random_ids(2, 20), [], []
    for checkpointing in (False, True):
        model, count = tiny_model().train(), []
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, count=count: count.append(1))
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        passes.append(len(count))
    assert passes == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_training_step_compiles_without_a_break_and_gives_equal_gradients(mixed):
    ids, gradients = random_ids(2, 20), []
    for forward in (mixed.train(), torch.compile(mixed, fullgraph=True, backend="aot_eager")):
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in mixed.parameters()]))
        mixed.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_once_and_without_a_break():
    torch._dynamo.reset()
    model, graphs = tiny_model(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    decode = torch.compile(model, fullgraph=True, backend=count)
    ids, cache = random_ids(2, 16), StaticCache(config=model.config, max_cache_len=32)
    logits = [model(ids[:, :6], past_key_values=cache).logits]
    for step in range(6, 16):
        position = torch.tensor([[step]])
        logits.append(decode(ids[:, step : step + 1], position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=1e-5, rtol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_twins_loss_and_gradients_and_keeps_weights_whole(dtype, pair):
    ids, losses, gradients = random_ids(2, 20), [], []
    for model in pair:
        with torch.autocast("cpu", dtype=dtype):
            output = model.train()(ids, labels=ids, use_cache=False)
        output.loss.backward()
        assert output.logits.dtype == dtype
        losses.append(output.loss)
        gradients.append(dict(sorted((name, p.grad) for name, p in model.named_parameters())))
    assert torch.equal(*losses)
    assert {p.dtype for p in pair[0].parameters()} == {torch.float32}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    full = pair[0](ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(losses[0].float(), full, atol=0.05, rtol=0)


# -- losses -------------------------------------------------------------------------------------------------------------


def test_four_small_batches_with_num_items_in_batch_are_one_large_batch():
    """Texts of different lengths: a mean of means would weigh the tokens of short texts more."""
    model, ids = tiny_model().train(), random_ids(4, 20)
    labels = ids.clone()
    for row, length in enumerate((20, 5, 11, 3)):
        labels[row, length:] = -100
    model(ids, labels=labels, use_cache=False).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    items = (labels[:, 1:] != -100).sum()
    for row in range(4):
        model(
            ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items, use_cache=False
        ).loss.backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)


def test_the_trainer_smooths_labels_that_are_shifted(tmp_path):
    """0.9 of the next token's negative log-likelihood and 0.1 of the mean over the vocabulary."""
    model, ids = tiny_model(), random_ids(2, 20)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    assert isinstance(trainer.label_smoother, LabelSmoother)
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -logs.gather(-1, ids[:, 1:, None]).mean()
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    torch.testing.assert_close(loss, 0.9 * nll - 0.1 * logs.mean())


# -- loading and saving -------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize(
    "placed",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {**dict.fromkeys(STAY, "cpu"), "model.layers.1": "disk"}},
        {"dtype": "auto"},
        {"state_dict": None},
    ],
    ids=["cpu", "auto", "a layer on disk", "auto dtype", "plain"],
)
def test_a_folder_loads_onto_any_device_map(placed, tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    model.save_pretrained(tmp_path / "folder")
    if isinstance(placed.get("device_map"), dict):
        placed = {**placed, "offload_folder": str(tmp_path / "offload")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", **placed)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@TIED
def test_a_model_without_memory_becomes_the_one_in_the_folder(tied, tmp_path):
    """On the meta device weights take no memory; those of the folder fill them, and buffers are computed anew."""
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    with torch.device("meta"):
        empty = MiniGPTForCausalLM(model.config)
    assert {p.device.type for p in (*empty.parameters(), *empty.buffers())} == {"meta"}
    model.save_pretrained(tmp_path)
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path)  # which goes this way inside
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    empty._init_weights(empty.model.rotary_emb)
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


@TIED
def test_a_sharded_folder_is_the_same_model(tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@TIED
def test_a_vocabulary_grows_and_shrinks_and_keeps_what_it_knew(tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20).clamp(max=79)
    before = model(ids).logits
    for size in (120, 80):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        known = min(size, 99)
        torch.testing.assert_close(model(ids).logits[..., :known], before[..., :known])
        loss = model(ids, labels=ids).loss
        expected = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(loss, expected)
        model.save_pretrained(tmp_path / str(size))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(size))
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


# -- export -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_graph_computes_the_same_for_any_length(mixed):
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": random_ids(2, 20), "use_cache": False}
    program = torch.export.export(mixed, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for size in (9, 20, 40):
        ids = random_ids(2, size)
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, mixed(ids).logits)


@torch.no_grad()
def test_an_exported_decoder_with_its_cache_inside_writes_what_generate_writes():
    model, ids = tiny_model(), random_ids(1, 6)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=32,
        cache_config={"batch_size": 1, "max_cache_len": 32},
    )
    program = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32).export(
        input_ids=ids[:, :1], cache_position=torch.tensor([0])
    )
    step, written = program.module(), ids
    for position in range(15):
        logits = step(input_ids=written[:, position : position + 1], cache_position=torch.tensor([position]))
        if position >= 5:
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written[:, : expected.shape[1]], expected)
