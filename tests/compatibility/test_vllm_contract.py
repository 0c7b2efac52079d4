"""What vLLM's transformers backend asks of a model (read from vLLM 0.32), checked without vLLM.

It loads the body through `auto_map.AutoModel`, finds the attention by its source, puts a paged kernel of its own in its
place, and splits the model by its plans. `make neighbours` runs vLLM itself.
"""

import ast
import inspect
import textwrap
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTModel, vllm_plugin
from minigpt_hf.model import modeling_minigpt
from minigpt_hf.model.modeling_minigpt import MiniGPTAttention, eager_attention_forward
from tests.conftest import random_ids, tiny_config, tiny_model


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def test_the_body_is_found_without_the_package():
    auto_map = tiny_config().auto_map
    assert auto_map["AutoConfig"].endswith(MiniGPTConfig.__name__)
    assert auto_map["AutoModel"].endswith(MiniGPTModel.__name__)
    assert MiniGPTModel.is_backend_compatible()


def test_the_attention_is_found_by_its_source():
    """One look-up of the interface, bound to a local name; one call of that name; `scaling` an attribute of self."""
    source = ast.parse(textwrap.dedent(inspect.getsource(MiniGPTAttention.forward)))
    (lookup,) = calls(source, "ALL_ATTENTION_FUNCTIONS.get_interface")
    assert ast.unparse(lookup.args[0]) == "self.config._attn_implementation"
    bound = [n for n in ast.walk(source) if isinstance(n, ast.AnnAssign | ast.Assign) and n.value is lookup]
    (name,) = [ast.unparse(node.target) for node in bound]
    (call,) = calls(source, name)
    (scaling,) = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
    assert ast.unparse(scaling).startswith("self.")
    assert any(keyword.arg is None for keyword in call.keywords)  # **kwargs go on to the kernel
    whole = ast.parse(inspect.getsource(modeling_minigpt))
    assert len(calls(whole, "ALL_ATTENTION_FUNCTIONS.get_interface")) == 1


def test_each_attention_says_where_it_stands():
    model = tiny_model()
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert attention.layer_idx == index
        assert attention.config is model.config
        assert attention.is_causal is True
        assert "attn" not in dict(attention.named_children())
    assert [name for name, m in MiniGPTModel(tiny_config()).named_modules() if isinstance(m, nn.ModuleList)] == [
        "layers"
    ]


def test_a_kernel_of_another_makes_gets_heads_first_and_whatever_the_caller_gave():
    """As vLLM calls it: one flat row of tokens, positions of its own, keywords that only its kernel understands."""
    model, ids, seen = tiny_model(), random_ids(1, 12), []

    def kernel(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.append((module.layer_idx, query.shape, key.shape, value.shape, scaling, kwargs["engine"]))
        mask = torch.full((12, 12), -torch.inf).triu(1)
        return eager_attention_forward(module, query, key, value, mask, scaling)

    positions = torch.arange(12)[None] + 5
    expected = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    AttentionInterface.register("another", kernel)
    body = AutoModel.from_config(model.config, attn_implementation="another")
    body.load_state_dict(model.model.state_dict())
    hidden = body.eval()(
        input_ids=None,
        inputs_embeds=body.get_input_embeddings()(ids),
        position_ids=positions,
        use_cache=False,
        return_dict=False,
        engine="at work",
    )[0]
    queries, keys = torch.Size([1, 4, 12, 8]), torch.Size([1, 2, 12, 8])
    assert seen == [(layer, queries, keys, keys, 8**-0.5, "at work") for layer in range(2)]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_pp_plan"])
def test_the_plans_are_of_the_kinds_that_vllm_splits_by(plan):
    rules = getattr(MiniGPTConfig, plan)
    if plan == "base_model_pp_plan":
        assert list(rules) == [name for name, _ in MiniGPTModel(tiny_config()).named_children() if name in rules]
    else:
        projections = {name: style for name, style in rules.items() if name.endswith("_proj")}
        assert set(projections.values()) == {"colwise", "rowwise"}
        assert len(projections) == 7


def test_vllm_finds_the_plugin_of_the_installed_package():
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "minigpt"]
    assert entry.load() is vllm_plugin.register
    assert f'"{MiniGPTForCausalLM.__name__}"' in inspect.getsource(vllm_plugin.register)
