"""Requirements of vLLM's transformers backend (as of vLLM 0.32), tested without vLLM.

vLLM loads the base model through `auto_map.AutoModel`, locates the attention by inspecting its source, replaces it by a
paged attention function and shards the model by its parallelism plans. `make neighbours` runs vLLM itself.
"""

import ast
import inspect
import textwrap
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTModel
from minigpt_hf.integrations import vllm as vllm_plugin
from minigpt_hf.model import modeling_minigpt
from minigpt_hf.model.modeling_minigpt import MiniGPTAttention, eager_attention_forward
from tests.conftest import random_ids, tiny_config, tiny_model


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def test_auto_map_names_the_base_model():
    auto_map = tiny_config().auto_map
    assert auto_map["AutoConfig"].endswith(MiniGPTConfig.__name__)
    assert auto_map["AutoModel"].endswith(MiniGPTModel.__name__)
    assert MiniGPTModel.is_backend_compatible()


def test_the_attention_call_is_recognizable_in_the_source():
    """One lookup of the attention interface, assigned to a name, and one call with `scaling=self.…` and `**kwargs`."""
    source = ast.parse(textwrap.dedent(inspect.getsource(MiniGPTAttention.forward)))
    (lookup,) = calls(source, "ALL_ATTENTION_FUNCTIONS.get_interface")
    assert ast.unparse(lookup.args[0]) == "self.config._attn_implementation"
    assignments = [n for n in ast.walk(source) if isinstance(n, ast.AnnAssign | ast.Assign) and n.value is lookup]
    (name,) = [ast.unparse(node.target) for node in assignments]
    (call,) = calls(source, name)
    (scaling,) = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
    assert ast.unparse(scaling).startswith("self.")
    assert any(keyword.arg is None for keyword in call.keywords)  # **kwargs are passed on to the attention function
    module = ast.parse(inspect.getsource(modeling_minigpt))
    assert len(calls(module, "ALL_ATTENTION_FUNCTIONS.get_interface")) == 1


def test_each_attention_layer_has_the_attributes_that_vllm_reads():
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


def test_a_registered_attention_function_receives_head_first_tensors_and_extra_arguments():
    """As vLLM calls it: one flattened sequence, explicit positions, and arguments for the attention function."""
    model, ids, received = tiny_model(), random_ids(1, 12), []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        received.append((module.layer_idx, query.shape, key.shape, value.shape, scaling, kwargs["engine"]))
        mask = torch.full((12, 12), -torch.inf).triu(1)
        return eager_attention_forward(module, query, key, value, mask, scaling)

    positions = torch.arange(12)[None] + 5
    expected = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    AttentionInterface.register("custom", attention)
    base_model = AutoModel.from_config(model.config, attn_implementation="custom")
    base_model.load_state_dict(model.model.state_dict())
    hidden = base_model.eval()(
        input_ids=None,
        inputs_embeds=base_model.get_input_embeddings()(ids),
        position_ids=positions,
        use_cache=False,
        return_dict=False,
        engine="vllm",
    )[0]
    queries, keys = torch.Size([1, 4, 12, 8]), torch.Size([1, 2, 12, 8])
    assert received == [(layer, queries, keys, keys, 8**-0.5, "vllm") for layer in range(2)]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_pp_plan"])
def test_vllm_supports_the_styles_and_order_of_the_parallelism_plans(plan):
    rules = getattr(MiniGPTConfig, plan)
    if plan == "base_model_pp_plan":
        assert list(rules) == [name for name, _ in MiniGPTModel(tiny_config()).named_children() if name in rules]
    else:
        projections = {name: style for name, style in rules.items() if name.endswith("_proj")}
        assert set(projections.values()) == {"colwise", "rowwise"}
        assert len(projections) == 7


def test_the_vllm_plugin_is_an_entry_point_of_the_package():
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "minigpt"]
    assert entry.load() is vllm_plugin.register
    assert f'"{MiniGPTForCausalLM.__name__}"' in inspect.getsource(vllm_plugin.register)
