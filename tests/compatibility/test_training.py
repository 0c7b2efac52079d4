"""Training features of transformers: checkpointing, compilation, autocast, losses, loading, saving and export."""

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

CPU_MODULES = ["model.embed_tokens", "model.dropout", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture
def mixed() -> MiniGPTForCausalLM:
    """A model with one full and one sliding attention layer; compiled graphs are discarded before and after."""
    torch._dynamo.reset()
    yield tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    torch._dynamo.reset()


# -- checkpointing, compilation and autocast ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_activations_and_gives_equal_gradients(reentrant):
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


@pytest.mark.slow
def test_a_training_step_compiles_without_graph_breaks_and_gives_equal_gradients(mixed):
    ids, gradients = random_ids(2, 20), []
    for forward in (mixed.train(), torch.compile(mixed, fullgraph=True, backend="aot_eager")):
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in mixed.parameters()]))
        mixed.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_once_without_graph_breaks():
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
def test_autocast_gives_the_loss_and_gradients_of_the_twin_and_float32_weights(dtype, pair):
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


# -- losses ------------------------------------------------------------------------------------------------------------


def test_gradient_accumulation_with_num_items_in_batch_equals_one_large_batch():
    """Sequences have different lengths, so that a mean of means would differ."""
    model, ids = tiny_model().train(), random_ids(4, 20)
    labels = ids.clone()
    for row, length in enumerate((20, 5, 11, 3)):
        labels[row, length:] = -100
    model(ids, labels=labels, use_cache=False).loss.backward()
    expected_gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    num_items = (labels[:, 1:] != -100).sum()
    for row in range(4):
        model(
            ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items, use_cache=False
        ).loss.backward()
    for parameter, expected in zip(model.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)


def test_label_smoothing_of_the_trainer_uses_shifted_labels(tmp_path):
    """The loss is 0.9 · NLL of the next token + 0.1 · mean NLL over the vocabulary."""
    model, ids = tiny_model(), random_ids(2, 20)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    assert isinstance(trainer.label_smoother, LabelSmoother)
    log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    torch.testing.assert_close(loss, 0.9 * nll - 0.1 * log_probabilities.mean())


# -- loading and saving ------------------------------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {**dict.fromkeys(CPU_MODULES, "cpu"), "model.layers.1": "disk"}},
        {"dtype": "auto"},
        {"state_dict": None},
    ],
    ids=["cpu", "auto", "layer on disk", "auto dtype", "default"],
)
def test_a_model_loads_with_any_device_map(options, tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    model.save_pretrained(tmp_path / "folder")
    if isinstance(options.get("device_map"), dict):
        options = {**options, "offload_folder": str(tmp_path / "offload")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", **options)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@TIED
def test_a_model_on_the_meta_device_can_be_materialized(tied, tmp_path):
    """Weights are loaded from the state dict; non-persistent buffers are recomputed."""
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    with torch.device("meta"):
        empty = MiniGPTForCausalLM(model.config)
    assert {p.device.type for p in (*empty.parameters(), *empty.buffers())} == {"meta"}
    model.save_pretrained(tmp_path)
    loaded = MiniGPTForCausalLM.from_pretrained(tmp_path)  # initializes on the meta device as well
    for (name, expected), (_, buffer) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    empty._init_weights(empty.model.rotary_emb)
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


@TIED
def test_a_sharded_checkpoint_loads_the_same_model(tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@TIED
def test_resizing_the_embeddings_preserves_the_logits_of_existing_tokens(tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 20).clamp(max=79)
    before = model(ids).logits
    for size in (120, 80):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        common = min(size, 99)
        torch.testing.assert_close(model(ids).logits[..., :common], before[..., :common])
        loss = model(ids, labels=ids).loss
        expected = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(loss, expected)
        model.save_pretrained(tmp_path / str(size))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(size))
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


# -- export ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_graph_gives_equal_logits_for_any_length(mixed):
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": random_ids(2, 20), "use_cache": False}
    program = torch.export.export(mixed, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for size in (9, 20, 40):
        ids = random_ids(2, size)
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, mixed(ids).logits)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_decoder_with_a_static_cache_generates_the_greedy_tokens():
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
    step, generated = program.module(), ids
    for position in range(15):
        logits = step(input_ids=generated[:, position : position + 1], cache_position=torch.tensor([position]))
        if position >= 5:
            generated = torch.cat([generated, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated[:, : expected.shape[1]], expected)
