"""A checkpoint in nanoGPT's format is converted to a GPT-2 folder that loads and computes the same logits."""

import json
import pickle
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minigpt_hf.cli import main
from minigpt_hf.integrations.nanogpt import nanogpt_logits

CHARACTERS = "\n !abcdefgh"
ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "vocab_size": len(CHARACTERS)}


def weights(bias: bool = False) -> dict[str, torch.Tensor]:
    """Shapes and names of nanoGPT's `model.py`; norm weights differ from 1, so that each affects the logits."""
    width, generator = ARGS["n_embd"], torch.Generator().manual_seed(0)
    shapes = {"transformer.wte": (ARGS["vocab_size"], width), "transformer.wpe": (ARGS["block_size"], width)}
    for layer in range(ARGS["n_layer"]):
        prefix = f"transformer.h.{layer}"
        shapes |= {f"{prefix}.ln_1": (width,), f"{prefix}.ln_2": (width,)}
        shapes |= {f"{prefix}.attn.c_attn": (3 * width, width), f"{prefix}.attn.c_proj": (width, width)}
        shapes |= {f"{prefix}.mlp.c_fc": (4 * width, width), f"{prefix}.mlp.c_proj": (width, 4 * width)}
    shapes["transformer.ln_f"] = (width,)
    state = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if bias:
        names = [name for name in shapes if name not in ("transformer.wte", "transformer.wpe")]
        state |= {f"{name}.bias": torch.randn(shapes[name][0], generator=generator) for name in names}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def write(folder, state=None, args=ARGS, **more):
    checkpoint = {"model": weights() if state is None else state, "model_args": args, "iter_num": 5, "config": {}}
    torch.save({**checkpoint, "best_val_loss": torch.tensor(1.0), **more}, folder / "ckpt.pt")
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: character for character, i in stoi.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return ["import", str(folder / "ckpt.pt"), "--output_dir", str(folder / "gpt2"), "--meta", str(folder / "meta.pkl")]


def nanogpt(state, ids):
    """nanoGPT's forward pass on one sequence, head by head and position by position: no batches, masks or transposes."""
    get = lambda name: (state[f"{name}.weight"], state.get(f"{name}.bias"))  # noqa: E731
    norm = lambda name, x: torch.nn.functional.layer_norm(x, x.shape[-1:], *get(name))  # noqa: E731
    linear = lambda name, x: torch.nn.functional.linear(x, *get(name))  # noqa: E731
    x = torch.stack(
        [state["transformer.wte.weight"][i] + state["transformer.wpe.weight"][t] for t, i in enumerate(ids)]
    )
    for layer in range(ARGS["n_layer"]):
        prefix = f"transformer.h.{layer}"
        query, key, value = linear(f"{prefix}.attn.c_attn", norm(f"{prefix}.ln_1", x)).chunk(3, dim=-1)
        rows = []
        for t in range(len(ids)):
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                share = (key[: t + 1, head] @ query[t, head] / 8**0.5).softmax(0)
                heads.append(share @ value[: t + 1, head])
            rows.append(torch.cat(heads))
        x = x + linear(f"{prefix}.attn.c_proj", torch.stack(rows))
        inner = linear(f"{prefix}.mlp.c_fc", norm(f"{prefix}.ln_2", x))
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))  # the exact GELU
        x = x + linear(f"{prefix}.mlp.c_proj", inner)
    return norm("transformer.ln_f", x) @ state["lm_head.weight"].mT


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_an_imported_folder_gives_the_logits_of_nanogpt(bias, tmp_path, capsys):
    state = weights(bias)
    assert main(write(tmp_path, state, {**ARGS, "bias": bias})) == 0
    assert "differ from nanoGPT's by at most" in capsys.readouterr().out
    ids = torch.randint(len(CHARACTERS), (8,), generator=torch.Generator().manual_seed(1))
    expected = nanogpt(state, ids.tolist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    torch.testing.assert_close(model(ids[None]).logits[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(nanogpt_logits(state, ARGS, ids[None])[0], expected, atol=1e-4, rtol=0)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert all(bool(value.any()) == bias for value in biases)


def test_prefixes_of_compiled_models_and_stored_masks_are_removed(tmp_path):
    state = {f"_orig_mod.{name}": value for name, value in weights().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    assert main(write(tmp_path, state)) == 0


def test_other_commands_accept_an_imported_folder(tmp_path, capsys):
    assert main(write(tmp_path)) == 0
    folder, text = str(tmp_path / "gpt2"), tmp_path / "text.txt"
    text.write_text("a bad cafe\nhad a cab !\n" * 9)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a bad\ncab !").input_ids) == "a bad\ncab !"
    capsys.readouterr()
    assert main(["evaluate", folder, "--data", str(text), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["tokens"] == len(text.read_text())  # including the first: a line feed is the BOS token
    assert main(["generate", folder, "--prompt", "a\nb", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("a\nb")
    assert main(["generate", folder]) == 2
    assert "no BOS token to start a document with: give a prompt" in capsys.readouterr().err


def test_gpt2_tokens_are_taken_from_a_tokenizer(run_folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run_folder / "model")
    state, rows = weights(), len(tokenizer) + 7  # rows that no token uses, as nanoGPT's 50,304 for 50,257
    state["transformer.wte.weight"] = state["lm_head.weight"] = torch.randn(rows, ARGS["n_embd"])
    argv = write(tmp_path, state, {**ARGS, "vocab_size": rows})[:-2]
    assert main([*argv, "--tokenizer", str(run_folder / "model")]) == 0
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (rows, tokenizer.eos_token_id)


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


BAD = {
    "code in the checkpoint": (lambda f: torch.save(Code(), f / "ckpt.pt"), "pickles that contain code are rejected"),
    "code in the vocabulary": (
        lambda f: (f / "meta.pkl").write_bytes(pickle.dumps(Code())),
        "it refers to builtins.print, and is rejected",
    ),
    "not a pickle": (lambda f: (f / "ckpt.pt").write_text("hello"), "not a file written by `torch.save`"),
    "a checkpoint of another program": (
        lambda f: torch.save({"state_dict": {}}, f / "ckpt.pt"),
        "not a nanoGPT checkpoint",
    ),
    "a pickle without a vocabulary": (
        lambda f: (f / "meta.pkl").write_bytes(pickle.dumps({})),
        "not a nanoGPT vocabulary",
    ),
    "ids with a gap": (
        lambda f: (f / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 2}})),
        "does not map single characters to the ids 0 to 1",
    ),
    "too large a vocabulary": (lambda f: write(f, args={**ARGS, "vocab_size": 3}), "has 11 tokens, but .* has only 3"),
    "a missing weight": (
        lambda f: write(f, {name: w for name, w in weights().items() if "h.1.ln_2" not in name}),
        r"not those of nanoGPT's model: .*h\.1\.ln_2\.weight",
    ),
    "an incomplete architecture": (lambda f: write(f, args={"n_layer": 2}), "lacks n_head"),
    "the wrong number of heads": (lambda f: write(f, args={**ARGS, "n_head": 3}), "3"),
    "an existing folder": (lambda f: (f / "gpt2").mkdir(), "already exists"),
    "no checkpoint": (lambda f: (f / "ckpt.pt").unlink(), "no such file; give the `ckpt.pt`"),
    "no meta file": (lambda f: (f / "meta.pkl").unlink(), "no such file; give the `meta.pkl`"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_checkpoint_is_reported_in_one_line(case, tmp_path, capfd):
    argv = write(tmp_path)
    change, message = BAD[case]
    change(tmp_path)
    assert main(argv) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "gpt2" / "config.json").exists()


def test_a_missing_vocabulary_is_reported_with_the_remedy(tmp_path, capsys):
    assert main(write(tmp_path)[:-2]) == 2
    assert "--meta data/NAME/meta.pkl" in capsys.readouterr().err


def test_tokens_of_the_checkpoint_without_text_are_reported(tmp_path, capsys):
    """Such as with the vocabulary of another data set."""
    argv = write(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {character: i for i, character in enumerate("abc")}}))
    assert main(argv) == 0
    assert "ckpt.pt has 11 tokens, 8 more than the vocabulary; these decode to an empty text" in capsys.readouterr().err
