"""generate and evaluate accept causal language models of other architectures, and reject models that give wrong results."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    CTRLTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import minigpt_hf
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import byte_tokenizer


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """A model with ALiBi, which has no maximum context length."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return save(BloomForCausalLM(config), tmp_path_factory.mktemp("bloom"))


@pytest.fixture
def copy(run_folder, tmp_path):
    return shutil.copytree(run_folder / "model", tmp_path / "model")


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rejected(argv, capfd) -> str:
    capfd.readouterr()
    assert main([str(word) for word in argv]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("minigpt ")]
    return line


def test_a_model_without_a_maximum_context_generates_and_is_evaluated(bloom, text_file, capfd):
    assert main(["generate", bloom, "--prompt", "def ", "--max_new_tokens", "4", "--do_sample", "false"]) == 0
    assert capfd.readouterr().out.startswith("def ")
    score = minigpt_hf.evaluate(bloom, str(text_file), block_size=32, max_characters=500)
    assert 4 < score.loss < 8  # near ln 258 = 5.55


def test_a_model_is_evaluated_in_windows_of_its_longest_context_whatever_its_name(tmp_path, text_file):
    config = MptConfig(vocab_size=258, d_model=16, n_layers=1, n_heads=2, max_seq_len=16)
    assert minigpt_hf.evaluate(save(MptForCausalLM(config), tmp_path), str(text_file)).block_size == 16


def test_a_model_that_numbers_positions_after_the_padding_index_is_evaluated_in_its_context(tmp_path, text_file):
    """RoBERTa with `pad_token_id` 1 uses the positions 2 to `max_position_embeddings` - 1."""
    config = RobertaConfig(
        vocab_size=258,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=18,
        is_decoder=True,
        pad_token_id=1,
    )
    folder = save(RobertaForCausalLM(config), tmp_path)
    assert minigpt_hf.evaluate(folder, str(text_file), max_characters=500).block_size == 16


def test_a_multimodal_model_generates_and_is_evaluated_with_the_settings_of_its_language_model(tmp_path, text_file):
    text = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 24}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=257)
    folder = save(Gemma3ForConditionalGeneration(config), tmp_path)
    assert minigpt_hf.evaluate(folder, str(text_file), max_characters=500).block_size == 24
    assert minigpt_hf.generate(folder, "ab", max_new_tokens=2)[0].startswith("ab")


def test_a_bidirectional_model_is_rejected(tmp_path, text_file, capfd):
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    folder = save(BertForMaskedLM(config), tmp_path / "bert")
    for argv in (["generate", folder, "--prompt", "a"], ["evaluate", folder, "--data", text_file]):
        assert "not a causal language model" in rejected(argv, capfd)


@pytest.mark.parametrize("is_lossy", [True, False])
def test_a_tokenizer_in_python_that_loses_text_is_reported(is_lossy, tmp_path, capfd):
    """CTRL's has no `tokenizer.json`; it knows no upper case here, and divides words at white space."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<unk>", "<s>", *letters, *(f"{letter}@@" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer = CTRLTokenizer(*files, bos_token="<s>", eos_token="<s>")
    config = CTRLConfig(vocab_size=len(tokens), n_embd=16, n_layer=1, n_head=2, dff=16, n_positions=16)
    CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    tokenizer.save_pretrained(tmp_path / "ctrl")
    text = tmp_path / "text.txt"
    text.write_text("One\n\n  two  THREE\n" * 20 if is_lossy else "one two three")
    assert main(["evaluate", str(tmp_path / "ctrl"), "--data", str(text)]) == 0
    message = capfd.readouterr().err
    assert ("the tokenizer does not reproduce the text" in message) == is_lossy
    assert ("of the tokens are unknown; upper case, white space lost or changed" in message) == is_lossy


def test_a_huge_perplexity_is_printed_with_an_exponent(copy, text_file, capfd):
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].mul_(1e2))
    assert main(["evaluate", str(copy), "--data", str(text_file), "--max_characters", "500"]) == 0
    assert re.search(r"^perplexity      \d\.\d{5}e\+\d+$", capfd.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("architecture", ["BERT", "XLNet"])
def test_a_causal_architecture_with_bidirectional_attention_is_rejected(architecture, tmp_path, text_file, capfd):
    """`BertLMHeadModel` is causal if `is_decoder` is true, `XLNetLMHeadModel` if `attn_type` is "uni"."""
    size = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for is_causal in (False, True):
        torch.manual_seed(0)
        if architecture == "BERT":
            model = BertLMHeadModel(BertConfig(**size, intermediate_size=16, is_decoder=is_causal))
        else:
            attention = "uni" if is_causal else "bi"
            model = XLNetLMHeadModel(
                XLNetConfig(vocab_size=258, d_model=16, n_layer=1, n_head=2, d_inner=16, attn_type=attention)
            )
        folder = save(model, tmp_path / str(is_causal))
        for argv in (["generate", folder, "--prompt", "a"], ["evaluate", folder, "--data", text_file]):
            if is_causal:
                argv += ["--max_new_tokens", "2"] if argv[0] == "generate" else ["--max_characters", "200"]
                assert main([str(word) for word in argv]) == 0
            else:
                assert "with these settings, is not a causal language model" in rejected(argv, capfd)


def test_logits_that_are_not_finite_are_not_reported_as_bidirectional_attention(copy, text_file, capfd):
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    assert "weights or activations are not finite" in rejected(["evaluate", copy, "--data", text_file], capfd)


def test_non_finite_weights_are_rejected_by_generate(copy, capfd):
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert "its weights are not finite (model.norm.weight)" in rejected(["generate", copy, "--prompt", "a"], capfd)


def test_weights_of_an_integer_type_are_rejected(copy, text_file, capfd):
    def to_int8(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    rewrite(copy, to_int8)
    for argv in (["generate", copy, "--prompt", "a"], ["evaluate", copy, "--data", text_file]):
        assert "model.norm.weight is of the type I8" in rejected(argv, capfd)


@pytest.mark.parametrize(("key", "value"), [("num_labels", 10**9), ("rms_norm_eps", float("nan"))])
def test_a_configuration_that_would_hang_or_is_not_finite_is_rejected(key, value, copy, capfd):
    config = json.loads((copy / "config.json").read_text()) | {key: value}
    (copy / "config.json").write_text(json.dumps(config))
    assert f"`{key}` is" in rejected(["generate", copy, "--prompt", "a"], capfd)


def test_tensors_that_the_model_does_not_have_are_reported(copy, capfd):
    rewrite(copy, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert main(["generate", str(copy), "--prompt", "def ", "--max_new_tokens", "2"]) == 0
    assert "1 unexpected tensors are ignored (extra, …)" in capfd.readouterr().err


def test_stop_strings_may_be_given_as_an_option_or_by_the_generation_config(copy, capfd):
    command = ["generate", str(copy), "--prompt", "def ", "--max_new_tokens", "60", "--seed", "1"]
    assert main(command) == 0
    text = capfd.readouterr().out.removeprefix("def ")
    stop = re.search(r"\w{2}", text)[0]
    assert main([*command, "--stop_strings", stop]) == 0
    stopped = capfd.readouterr().out
    assert stop in stopped.removeprefix("def ")
    assert len(stopped) < len(text)
    assert main([*command, "--stop_strings", "123"]) == 0  # text, not a number
    capfd.readouterr()
    settings = json.loads((copy / "generation_config.json").read_text()) | {"stop_strings": [stop]}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    assert main(command) == 0
    assert capfd.readouterr().out == stopped


def test_misspelled_and_unavailable_options_are_rejected(run_folder, capfd):
    folder = run_folder / "model"
    assert "do_sample is 'nope': true or false" in rejected(["generate", folder, "--do_sample", "nope"], capfd)
    assert "return_dict_in_generate" in rejected(["generate", folder, "--return_dict_in_generate", "true"], capfd)
    assert main(["generate", str(folder), "--prompt", "def ", "--temperature", "0.0", "--do_sample", "true"]) == 2
    out, err = capfd.readouterr()
    assert out == ""  # the prompt is printed with the first generated token
    assert err.startswith("minigpt generate: ")


def test_arguments_of_the_python_interface_are_checked(run_folder, text_file):
    with pytest.raises(ValueError, match="split is 'valid': give one of all, train, validation"):
        minigpt_hf.evaluate(run_folder / "model", str(text_file), split="valid")
    with pytest.raises(ValueError, match="data is a list"):
        minigpt_hf.evaluate(run_folder / "model", [str(text_file)])
    with pytest.raises(ValueError, match="the prompt is a NoneType"):
        minigpt_hf.generate(run_folder / "model", None)
