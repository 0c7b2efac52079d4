"""The HTML page: its JavaScript computes what torch computes; weights in each dtype; what is rejected."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.export import html as module
from minigpt_hf.export.html import STAGES, export_html
from minigpt_hf.model import modeling_minigpt
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import representative, tiny_model
from tests.export.page_runner import ask, exported_page, greedy, needs_node
from tests.publish.strings import TOKENIZERS, strings

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
)
ARCHITECTURES = {
    "multi-head attention": {"num_key_value_heads": 4},
    "grouped-query attention": {"num_key_value_heads": 2},
    "one key and value head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "sliding window": {"use_sliding_window": True, "sliding_window": 9},
    "some layers with a window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "wide heads, odd sizes": {"head_dim": 10, "hidden_size": 30, "intermediate_size": 50, "num_attention_heads": 3}
    | {"num_key_value_heads": 3},
    "another base of RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}


def chat_tokenizer(template=CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """The page of a trained model with a sliding window of 33 tokens."""
    (page,) = export_html(run_folder / "model", tmp_path_factory.mktemp("html") / "out", "float32").iterdir()
    return page


@pytest.fixture(scope="module")
def model(run_folder):
    return AutoModelForCausalLM.from_pretrained(run_folder / "model", attn_implementation="eager").eval()


# -- tokens -----------------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize("kind", representative(TOKENIZERS, "bpe", "characters", "adversarial"))
def test_200_strings_have_the_same_ids_and_survive_a_round_trip(kind, tmp_path):
    tokenizer, texts = TOKENIZERS[kind](), strings()
    assert len(texts) == 200
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    page = exported_page(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    ids, decoded = ask(page, {"request": "encode", "texts": texts}, {"request": "decode", "sequences": expected})
    assert [text for text, a, b in zip(texts, ids, expected, strict=True) if a != b] == []
    assert decoded == texts


@needs_node
def test_an_unfinished_character_is_decoded_as_in_python_and_special_tokens_are_skipped(tmp_path):
    tokenizer = byte_tokenizer()
    sequences = [[byte + 2 for byte in "é😀".encode()][:-1], [0, 67, 1, 68], [0xFF + 2, 67], []]
    page = exported_page(tiny_model(vocab_size=258), tokenizer, tmp_path)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    assert ask(page, {"request": "decode", "sequences": sequences}) == [expected]


@needs_node
def test_added_tokens_that_are_not_special_are_matched_in_text(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<a>"), AddedToken("<a>b"), AddedToken("[x]+", normalized=False)])
    texts = ["<a>", "<a>b<a>", "x[x]+y", "<a<a>>", "<|endoftext|><a>"]
    expected = [tokenizer(text, split_special_tokens=True).input_ids for text in texts]
    page = exported_page(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    assert ask(page, {"request": "encode", "texts": texts}) == [expected]


@needs_node
def test_text_is_normalized_to_nfc_if_the_tokenizer_does_so(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    expected = [tokenizer(text).input_ids for text in strings()]
    assert expected != [byte_tokenizer()(text).input_ids for text in strings()]
    page = exported_page(tiny_model(vocab_size=258), tokenizer, tmp_path)
    ids = ask(page, {"request": "encode", "texts": strings()})[0]
    special = [i for i, text in enumerate(strings()) if "<|" in text]  # ordinary text in the page
    assert [ids[i] for i in range(200) if i not in special] == [expected[i] for i in range(200) if i not in special]


@needs_node
def test_an_unknown_character_is_named(tmp_path):
    tokenizer = TOKENIZERS["characters"]()
    page = exported_page(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    message = 'the model does not know the character "Ж" (U+0416); remove it'
    assert ask(page, {"request": "error", "text": "a Ж"}) == [message]


# -- logits and text --------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize(
    "name",
    representative(
        ARCHITECTURES, "untied", "some layers with a window", "wide heads, odd sizes", "another base of RoPE"
    ),
)
def test_logits_equal_those_of_torch(name, tmp_path):
    """In one pass of several chunks, and token by token; in WebAssembly and in JavaScript."""
    model = tiny_model(vocab_size=258, max_position_embeddings=200, **ARCHITECTURES[name])
    page = exported_page(model, byte_tokenizer(), tmp_path)
    ids = torch.randint(0, 258, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    request = {"request": "logits", "ids": ids[0].tolist(), "backend": "WebAssembly"}
    in_parts = {**request, "parts": [1] * 40 + [3, 107]}
    for logits in ask(page, request, in_parts, {**request, "backend": "JavaScript"}):
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@needs_node
def test_greedy_text_of_twenty_prompts_equals_that_of_generate_beyond_the_window(page, run_folder, model, text):
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "model")
    prompts = [tokenizer(text[start : start + 20]).input_ids for start in range(0, 20_000, 1000)]
    options = {"temperature": 0, "maxNewTokens": 36}
    found = ask(page, *({"request": "generate", "ids": ids, "options": options} for ids in prompts))
    assert model.config.sliding_window < 36
    assert found == [greedy(model, ids, 36) for ids in prompts]


@needs_node
def test_attention_weights_equal_those_of_torch(page, model):
    ids = list(range(2, 52))
    with torch.no_grad():
        expected = model(torch.tensor([ids]), output_attentions=True).attentions
    (found,) = ask(page, {"request": "attention", "ids": ids})
    np.testing.assert_allclose(found, [layer[0].numpy() for layer in expected], atol=1e-4, rtol=0)


@needs_node
def test_an_ablated_head_contributes_nothing(page, model, run_folder):
    """Equal to a model whose output projection ignores the head."""
    ids, layer, head = list(range(2, 52)), 1, 2
    (found,) = ask(page, {"request": "logits", "ids": ids, "ablated": [layer * 4 + head]})
    ablated = AutoModelForCausalLM.from_pretrained(run_folder / "model").eval()
    with torch.no_grad():
        size = model.config.head_dim
        ablated.model.layers[layer].self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
        np.testing.assert_allclose(found, ablated(torch.tensor([ids])).logits[0].numpy(), atol=1e-4, rtol=0)


@needs_node
def test_generation_stops_at_a_stop_token_and_at_the_end_of_the_context(tmp_path):
    model = tiny_model(vocab_size=258, max_position_embeddings=30)
    stop = greedy(model, [5, 6], 8)[5]
    model.generation_config.eos_token_id = [stop]
    page = exported_page(model, byte_tokenizer(), tmp_path)
    options = {"temperature": 0, "maxNewTokens": 100}
    stopped, full = ask(
        page,
        {"request": "generate", "ids": [5, 6], "options": options},
        {"request": "generate", "ids": [5, 6], "options": {**options, "stop": []}},
    )
    assert stopped == greedy(model, [5, 6], 20)
    assert stopped[-1] == stop
    assert len(full) == 28


def pattern(kind: str, ids: list[int]) -> list[list[float]]:
    """Attention weights [T, T] of a head with one behavior; where it does not apply, all weight is on the token itself."""
    weights = np.zeros((len(ids), len(ids)))
    for t, token in enumerate(ids):
        earlier = [s + 1 for s in range(t - 1) if ids[s] == token]
        keys = {
            "current token": [t],
            "previous token": [max(t - 1, 0)],
            "3 back": [max(t - 3, 0)],
            "first token": [0],
            "induction": earlier or [t],
            "mixed": list(range(t + 1)),
        }[kind]
        weights[t, keys] = 1 / len(keys)
    return weights.tolist()


@needs_node
@pytest.mark.parametrize("kind", ["current token", "previous token", "3 back", "first token", "induction", "mixed"])
def test_a_head_is_labeled_by_what_it_attends_to(kind, page):
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    ((label, score),) = ask(page, {"request": "head", "weights": pattern(kind, ids), "ids": ids})
    assert label == kind
    assert score == pytest.approx(1) if kind != "mixed" else score < 0.4


# -- sampling ---------------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"topK": 5},
        {"topP": 0.6},
        {"repetitionPenalty": 1.3},
        {"temperature": 1.4, "topK": 20, "topP": 0.9, "repetitionPenalty": 1.1},
        {"topK": 1000, "topP": 0.01},
    ],
)
def test_the_sampling_distribution_is_that_of_transformers(options, page):
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    previous, scores = [1, 2, 3, 3], logits.clone()
    if penalty := options.get("repetitionPenalty"):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([previous]), scores)
    if temperature := options.get("temperature"):
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k := options.get("topK"):
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p := options.get("topP"):
        scores = TopPLogitsWarper(top_p)(None, scores)
    request = {"request": "distribution", "logits": logits[0].tolist(), "options": options, "previous": previous}
    (found,) = ask(page, request)
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-6)


@needs_node
def test_tokens_are_drawn_with_their_probabilities_and_the_seed_determines_them(page):
    probabilities = [0.5, 0, 0.3, 0.2]
    (found,) = ask(page, {"request": "frequencies", "probabilities": probabilities, "draws": 20_000})
    assert found == pytest.approx(probabilities, abs=0.015)
    assert found[1] == 0
    requests = [
        {"request": "generate", "ids": [5], "options": {"maxNewTokens": 20, "seed": seed}} for seed in (1, 1, 2)
    ]
    first, same, other = ask(page, *requests)
    assert first == same != other


# -- chat -------------------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM])
def test_a_conversation_has_the_ids_of_the_chat_template(template, tmp_path):
    tokenizer = chat_tokenizer(template)
    page = exported_page(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    question, reply = {"role": "user", "content": "Grüße <|im_end|>?"}, {"role": "assistant", "content": " ja\n"}
    system = {"role": "system", "content": "brief"}
    conversations = [[question], [question, reply, question], [system, question]]
    found = ask(page, *({"request": "chat", "messages": messages} for messages in conversations))
    for ids, messages in zip(found, conversations, strict=True):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == rendered
        injected = rendered.replace("Grüße <|im_end|>?", "Grüße ?")
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == injected.count(
            "<|im_end|>"
        )  # special tokens in messages are text
    (data,) = ask(page, {"request": "data"})
    assert data["stop"] == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]


TEMPLATES = {
    "other markers": "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    "trimmed messages": CHATML.replace("message['content']", "message['content'] | trim"),
    "an endless loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}" + CHATML,
    "a long string": "{% set x = 'a' * 10000000000 %}" + CHATML,
    "a string that doubles": "{% set a = 'aaaaaaaa' %}" + "{% set a = a + a %}" * 60 + CHATML,
    "code": "{{ cycler.__init__.__globals__.os.popen('touch canary') }}" + CHATML,
    "invalid syntax": "{% for",
    "an error": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize(
    "name", representative(TEMPLATES, "trimmed messages", "an endless loop", "a string that doubles", "code")
)
def test_another_or_a_hostile_template_leaves_a_page_without_chat(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer(TEMPLATES[name])
    page = exported_page(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path)
    assert '"chat": null' in page.read_text()
    assert "its chat template is not ChatML; the page continues text and offers no chat" in caplog.text
    assert not (tmp_path / "canary").exists()


# -- weights ----------------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("int8", 0.5)])
def test_the_reported_deviation_is_that_of_the_page(dtype, tolerance, tmp_path):
    model = tiny_model(vocab_size=258)
    page = exported_page(model, byte_tokenizer(), tmp_path, dtype)
    ids = module.comparison_ids(model.config)
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    logits, data = ask(page, {"request": "logits", "ids": ids[0].tolist()}, {"request": "data"})
    assert np.abs(np.array(logits) - expected).max() == pytest.approx(data["storage"]["difference"], abs=1e-4)
    assert 1e-5 < data["storage"]["difference"] < tolerance


def test_float16_is_the_default_unless_it_changes_a_greedy_continuation(run_folder, tmp_path, monkeypatch):
    def dtype_of(name):
        (page,) = export_html(run_folder / "model", tmp_path / name).iterdir()
        return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])["storage"]["dtype"]

    assert dtype_of("equal") == "float16"
    deviation = module._deviation
    monkeypatch.setattr(module, "_deviation", lambda *models: (deviation(*models)[0], module.PROMPTS - 1))
    assert dtype_of("different") == "float32"


def test_the_command_reports_the_deviation_and_the_page_is_named_after_the_run(run_folder, tmp_path, capsys):
    argv = ["export", run_folder / "model", "--to", "html", "--output_dir", tmp_path / "out", "--dtype", "int8"]
    assert main([*map(str, argv)]) == 0
    out, err = capsys.readouterr()
    pattern = (
        r"weights in int8: the logits differ by at most \d\.\de-0\d, and \d+ of 20 greedy continuations are equal\n"
    )
    assert re.fullmatch(pattern, err), err
    assert out.splitlines()[1] == f"verified: {module.VERIFIED}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{run_folder.name}.html"]


def test_weights_that_were_changed_fail_verification(run_folder, tmp_path, monkeypatch):
    def changed(data, content):
        return document(data, content[:-4] + b"abcd")

    document = module.document
    monkeypatch.setattr(module, "document", changed)
    with pytest.raises(
        ValueError, match=r"it is not true that model\.norm\.weight equals the model's; nothing was written"
    ):
        export_html(run_folder / "model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the page ---------------------------------------------------------------------------------------------------------


def test_a_page_has_the_losses_samples_and_figures_of_its_run(page, run_folder):
    data = data_of(page)
    assert [tokens for tokens, _ in data["log"]["train"]] == [10 * 128, 20 * 128, 30 * 128, 40 * 128]
    assert [tokens for tokens, _ in data["log"]["validation"]] == [20 * 128, 40 * 128]
    assert [tokens for tokens, _ in data["log"]["samples"]] == [0, 20 * 128, 40 * 128]
    metadata = json.loads((run_folder / "model" / "minigpt.json").read_text())
    assert dict(data["facts"])["bits per byte of the validation text"] == f"{metadata['results']['bits_per_byte']:.3f}"


def test_a_page_states_that_its_score_is_not_one_of_unseen_text(run_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run_folder / "model", folder)
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["data"]["unseen_fraction"] = 0.05
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    (page,) = export_html(folder, tmp_path / "out", "float32").iterdir()
    labels = [label for label, _ in data_of(page)["facts"]]
    assert labels[0] == "bits per byte of the validation text, not of unseen text"
    assert "validation loss, not of unseen text" in labels and "validation loss" not in labels


def test_a_page_states_that_the_figures_of_a_chat_model_are_those_of_answers(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["recipe"]["chat"] = True
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    (page,) = export_html(folder, tmp_path / "out", "float32").iterdir()
    labels = [label for label, _ in data_of(page)["facts"]]
    assert labels[0] == "bits per byte of the answers of the validation split"
    assert {"training tokens, padding included", "bytes of answers per token of answers"} <= {*labels}
    assert not {"training tokens", "bytes per token"} & {*labels}


def test_a_page_states_that_its_training_text_is_the_last_one(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["training"]["changes"] = [{"step": 4, "setting": "data", "before": None, "after": None}]
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    (page,) = export_html(folder, tmp_path / "out", "float32").iterdir()
    labels = {label for label, _ in data_of(page)["facts"]}
    assert {f"{name}, as if the last text had always been used" for name in ("training text", "epochs")} <= labels


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])


def test_a_page_has_the_figures_of_verbatim_copying_and_no_training_text(page, run_folder):
    metadata = json.loads((run_folder / "model" / "minigpt.json").read_text())["copying"]
    data = data_of(page)
    assert [row[:3] for row in data["copying"]["rows"]] == [
        [name, f"{part['tokens']:,}", f"{part['longest']:,}"]
        for name, part in (("samples", metadata["samples"]), ("held-out text", metadata["held_out"]))
    ]
    assert [each["text"] for each in data["copying"]["stretches"]] == [each["text"] for each in metadata["stretches"]]
    assert data["samples"] is None


def test_with_sources_a_page_has_the_passages_that_its_samples_share_with_the_training_text(
    run_folder, text_file, text, tmp_path, capsys
):
    """The samples in the card of a copy of the model are replaced by an excerpt of the training text, and other text."""
    folder = copy_with_samples(run_folder, ["def ", ""], [f"def {text[3000:3200]}", "ξξξ"], tmp_path / "model")
    argv = ["export", str(folder), "--to", "html", "--with_sources", str(text_file)]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    (page,) = (tmp_path / "out").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    copied, other = data_of(page)["samples"]
    assert (copied["given"], tokenizer.decode(copied["ids"])) == ("def ", text[3000:3200])
    longest = max(copied["passages"], key=lambda passage: passage["tokens"])
    assert longest["tokens"] >= len(copied["ids"]) - 2
    assert longest["document"] == 1
    assert longest["before"] + longest["text"] + longest["after"] in text
    assert other["passages"] == []


def copy_with_samples(run_folder, given, texts, folder):
    shutil.copytree(run_folder / "model", folder)
    metadata = json.loads((folder / "minigpt.json").read_text())
    metadata["sample"] |= {"given": given, "texts": texts}
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    return folder


def test_sources_that_cannot_be_embedded_are_rejected(run_folder, text_file, tmp_path, capsys):
    without = copy_with_samples(run_folder, [], [], tmp_path / "model")
    for folder, flags, message in (
        (
            run_folder / "model",
            ["--to", "native", "--with_sources", text_file],
            "which --to native does not write: use --to",
        ),
        (run_folder / "model", ["--to", "html", "--with_sources", "missing.txt"], "missing.txt"),
        (without, ["--to", "html", "--with_sources", text_file], "its minigpt.json has no samples whose passages"),
    ):
        argv = ["export", folder, "--output_dir", tmp_path / "out", *flags]
        assert main([str(word) for word in argv]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_system_message_of_training_is_that_of_the_page(tmp_path):
    tokenizer = chat_tokenizer()
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "minigpt.json").write_text('{"recipe": {"chat": true, "system": "Be brief."}}')
    (page,) = export_html(tmp_path / "model", tmp_path / "out").iterdir()
    assert data_of(page)["chat"]["system"] == "Be brief."
    assert data_of(page)["hasOtherSystems"] is False


def test_a_page_without_the_system_messages_of_its_training_states_this(tmp_path, caplog):
    """The samples of the card are answers after them."""
    tokenizer = chat_tokenizer()
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    sample = {"conversations": [[{"role": "system", "content": "Add."}]]}
    (tmp_path / "model" / "minigpt.json").write_text(json.dumps({"recipe": {"chat": True}, "sample": sample}))
    (page,) = export_html(tmp_path / "model", tmp_path / "out").iterdir()
    assert data_of(page)["hasOtherSystems"] is True
    assert "have system messages of their own, which the page does not contain" in caplog.text


def test_a_folder_without_a_run_and_metadata_of_another_program_is_exported(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "minigpt.json").write_text(
        '{"name": ["x"], "results": 3, "copying": {"samples": [3]}, "sample": {"prompt": 5}, "x": NaN}'
    )
    (page,) = export_html(tmp_path / "model", tmp_path / "out").iterdir()
    assert page.name == "model.html"
    data = data_of(page)
    assert data["copying"] is None
    assert data["log"] == {"train": [], "validation": [], "samples": []}
    assert [label for label, _ in data["facts"]] == ["parameters"]


def test_each_stage_names_the_line_of_the_model_file():
    lines = modeling_minigpt.__spec__.loader.get_source(modeling_minigpt.__name__).splitlines()
    stages = module._stages()
    assert stages.keys() == STAGES.keys()
    for stage, start in STAGES.items():
        assert lines[stages[stage]["line"] - 1].strip() == stages[stage]["code"]
        assert stages[stage]["code"].startswith(start)


@needs_node
def test_a_qwen3_folder_is_exported(tmp_path):
    settings = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    qwen3.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (page,) = export_html(tmp_path / "model", tmp_path / "out", "float32").iterdir()
    (logits,) = ask(page, {"request": "logits", "ids": list(range(40))})
    with torch.no_grad():
        np.testing.assert_allclose(logits, qwen3(torch.arange(40)[None]).logits[0].numpy(), atol=1e-4, rtol=0)


def test_a_model_with_a_very_short_context_is_exported(tmp_path):
    page = exported_page(tiny_model(vocab_size=258, max_position_embeddings=6), byte_tokenizer(), tmp_path)
    assert '"max_position_embeddings": 6' in page.read_text()


def test_the_log_of_another_run_is_not_shown(run_folder, tmp_path, caplog):
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert module._log(run / "model")["train"] and not caplog.records
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    (run / "fingerprint.json").write_text(
        json.dumps({**fingerprint, "seed": 7})
    )  # its model was replaced by another one
    assert module._log(run / "model") == {"train": [], "validation": [], "samples": []}
    assert "log.jsonl: belongs to another training run" in caplog.text


def test_a_long_log_is_thinned_out_and_keeps_its_last_row(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    shutil.copy(run_folder / "fingerprint.json", tmp_path)
    rows = [{"step": i, "tokens": 10 * i, "loss": 5.0} for i in range(1, 2501)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = module._log(tmp_path / "model")["train"]
    assert 500 < len(losses) <= 1000
    assert losses[-1] == [25_000, 5.0]


# -- what is rejected -------------------------------------------------------------------------------------------------


def rejected(model, tokenizer, folder, message, **options):
    save_model_files(model, tokenizer, folder / "model")
    with pytest.raises(ValueError, match=message):
        export_html(folder / "model", folder / "out", **options)
    assert [path.name for path in folder.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_scaled_rope_is_rejected(kind, tmp_path):
    model = tiny_model(vocab_size=258, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    rejected(model, byte_tokenizer(), tmp_path, rf"scaled \({kind}\); the page supports only unscaled RoPE")


def test_another_activation_is_rejected(tmp_path):
    model = tiny_model(vocab_size=258, hidden_act="gelu")
    rejected(model, byte_tokenizer(), tmp_path, "its activation is gelu; the page supports only silu")


def test_a_tokenizer_that_cannot_be_represented_is_rejected(tmp_path):
    lower, words = byte_tokenizer(), byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    cases = [
        (lower, "it has the normalizer Lowercase"),
        (words, "it is neither byte-level BPE as in Qwen2 or GPT-2 nor"),
    ]
    for i, (tokenizer, reason) in enumerate(cases):
        message = f"the tokenizer cannot be represented in the page: {reason}.*; use `--to native`"
        (tmp_path / str(i)).mkdir()
        rejected(tiny_model(vocab_size=258), tokenizer, tmp_path / str(i), message)


def test_settings_of_generation_that_the_page_lacks_are_reported_and_do_not_affect_its_verification(tmp_path, caplog):
    model = tiny_model(vocab_size=258)
    model.generation_config.update(do_sample=True, num_return_sequences=2, stop_strings=["a"], min_p=0.1)
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    export_html(tmp_path / "model", tmp_path / "out")
    assert (
        "has no equivalent of stop_strings ['a'], min_p 0.1, num_return_sequences 2; it generates without"
        in caplog.text
    )


def test_weights_above_the_limit_are_rejected(run_folder, tmp_path, monkeypatch):
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run_folder / "model").parameters()) / 1e6
    for limit, dtype, remedy in (
        (3 * size, "float32", "use --dtype float16 or int8"),
        (1.5 * size, None, "use --dtype int8"),
        (0.5 * size, "int8", "use `--to native`, `gguf` or `onnx`"),
    ):
        monkeypatch.setattr(module, "MAX_MEGABYTES", limit)
        with pytest.raises(ValueError, match=rf"its weights need \d+ MB in \w+, and a page holds at most .*; {remedy}"):
            export_html(run_folder / "model", tmp_path / "out", dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_model_type_is_rejected(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model type is 'llama'; only MiniGPT and Qwen3 models can be exported"):
        export_html(tmp_path / "model", tmp_path / "out")
