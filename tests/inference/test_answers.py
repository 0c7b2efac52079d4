"""Generated answers and their scores, against hand calculations and the reference packages."""

import json

import numpy as np
import pytest
import torch
from transformers import set_seed

import minigpt_hf
from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.data.chat_format import ChatFormat, with_chat_tokens
from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.inference.answers import METRICS, generate_answers, score_answers

QUESTIONS = ["a", "What is it? Tell me.", "bcd", "Ж 🌱", "one two three four"]
REFERENCES = ["x y z", "It is that.", "It is that.", "ж", "five"]


@pytest.fixture
def tokenizer():
    return with_chat_tokens(byte_tokenizer())


@pytest.fixture
def model(tokenizer):
    """Random weights, large enough that answers differ, with an end token that is sometimes generated."""
    set_seed(3)
    config = MiniGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MiniGPTForCausalLM(config).eval()


def prompts():
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_generated_together_equal_those_generated_alone(batch_size, model, tokenizer):
    for ends in (tokenizer.eos_token_id, [tokenizer.eos_token_id, *range(2, 40)]):
        model.generation_config.eos_token_id = ends
        expected, ended = [], 0
        for prompt in prompts():
            ids = torch.from_numpy(ChatFormat(tokenizer).encode(prompt, add_generation_prompt=True))[None]
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
            new = new[0, ids.shape[1] :].tolist()
            expected.append(tokenizer.decode(new, skip_special_tokens=True))
            ended += bool({*new} & {*(ends if isinstance(ends, list) else [ends])})
        assert generate_answers(model, tokenizer, prompts(), 20, batch_size) == (expected, ended)
    assert ended > 0 and len({*expected}) > 1


def test_a_long_question_does_not_shorten_the_answers_to_others(model, tokenizer):
    """Its padded batch would leave one token for each answer."""
    model.generation_config.eos_token_id = 999
    length = len(ChatFormat(tokenizer).encode(prompts()[0], add_generation_prompt=True))
    long = [{"role": "user", "content": "a" * (128 - length)}]
    answers, _ = generate_answers(model, tokenizer, [*prompts(), long], 20)
    assert answers[:-1] == generate_answers(model, tokenizer, prompts(), 20)[0]
    assert [answers[-1]] == generate_answers(model, tokenizer, [long], 20)[0]
    assert len(tokenizer(answers[0]).input_ids) > 10


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"min_new_tokens": 20},
        {"repetition_penalty": 5.0},
        {"eos_token_id": None},
    ],
)
def test_settings_of_generation_do_not_change_the_answers(settings, model, tokenizer):
    expected = generate_answers(model, tokenizer, prompts(), 20)
    model.generation_config.update(**settings)
    assert generate_answers(model, tokenizer, prompts(), 20) == expected
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())


def test_a_reference_with_names_of_special_tokens_has_the_length_of_its_text(model, tokenizer):
    """Answers are text, in which each of these names is several tokens."""
    model.generation_config.eos_token_id = 999

    def answer_to(reference):
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": reference}]
        return score_answers(model, tokenizer, [conversation], "exact")[1][0]["answer"]

    assert answer_to("<|im_end|>" * 4) == answer_to("x" * 40)


def test_a_model_without_a_token_that_ends_answers_is_an_error(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(MiniGPTError, match="names the EOS token that ends an answer"):
        generate_answers(model, tokenizer, prompts(), 20)


def test_exact_ignores_surrounding_white_space_and_has_a_wilson_interval():
    compute = METRICS["exact"]()
    answers, references = [" a\n", "b", "A", "d"] + ["e"] * 6, list("abcd") + ["e"] * 5 + ["f"]
    share, low, high = compute(answers, references)
    assert share == 0.8
    # Wilson's interval for 8 of 10.
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert compute(["a"], ["b"])[:2] == (0, 0) and compute(["a"], ["a"])[::2] == (1, 1)


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
@pytest.mark.parametrize("correct", [1, 29])
def test_intervals_of_nearly_correct_and_nearly_wrong_answers_are_within_0_and_100(metric, correct):
    pytest.importorskip("sacrebleu")
    references = [f"the answer to question {i} has the number {i * 7}" for i in range(30)]
    answers = [text if i < correct else "" for i, text in enumerate(references)]
    _, low, high = METRICS[metric]()(answers, references)
    assert 0 <= low < high <= 100


@pytest.mark.parametrize("metric, name", [("chrf", "CHRF"), ("bleu", "BLEU")])
def test_chrf_and_bleu_are_those_of_sacrebleu(metric, name):
    metrics = pytest.importorskip("sacrebleu.metrics")
    answers = ["It is that one.", "No.", "It is that.", "ж", "four five"]
    score, low, high = METRICS[metric]()(answers, REFERENCES)
    expected = getattr(metrics, name)().corpus_score(answers, [REFERENCES], n_bootstrap=1000)
    assert score == expected.score
    assert low < score < high
    interval = np.clip([expected._mean - expected._ci, expected._mean + expected._ci], 0, 100)
    assert [low, high] == pytest.approx(interval, rel=1e-5)  # sacrebleu averages in float32


def test_rouge_is_the_mean_of_rouge_l():
    pytest.importorskip("rouge_score")
    # Longest common subsequences of 2 of 3 words, and of none.
    score, low, high = METRICS["rouge"]()(["the red house", "no"], ["the house burned", "yes"])
    assert score == pytest.approx((2 / 3 + 0) / 2)
    assert (low, high) == (0, pytest.approx(score + 1.959964 * (1 / 3) / 2**0.5))  # no score is below 0


def test_rouge_counts_words_of_every_script_and_ascii_words_as_rouge_score_does():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, reference in (("привет мир", "привет друг"), ("नमस्ते दुनिया", "नमस्ते मित्र")):  # one word of two
        assert METRICS["rouge"]()([answer], [reference])[0] == 0.5
    texts = ["It's the 2nd_red, House!", "the re-d house of 2 x"]
    assert METRICS["rouge"]()(texts[:1], texts[1:])[0] == scorer.score(texts[1], texts[0])["rougeL"].fmeasure


@pytest.mark.parametrize(("metric", "references"), [("bleu", ["42", "1 7"]), ("rouge", ["!", "🌱"])])
def test_a_metric_that_gives_0_to_the_references_themselves_is_an_error(metric, references, model, tokenizer):
    pytest.importorskip({"bleu": "sacrebleu", "rouge": "rouge_score"}[metric])
    conversations = [[*prompts()[0], {"role": "assistant", "content": text}] for text in references]
    with pytest.raises(MiniGPTError, match=f"--score {metric} gives 0 even to the references"):
        score_answers(model, tokenizer, conversations, metric)


def test_trivial_answers_are_scored_as_well(model, tokenizer):
    conversations = [
        [*prompt, {"role": "assistant", "content": reference}]
        for prompt, reference in zip(prompts(), ["a", "What is it?", "Ж 🌱", "Ж 🌱", "Ж 🌱"], strict=True)
    ]
    score, rows = score_answers(model, tokenizer, conversations, "exact")
    assert score.baselines == {"question": 0.4, "first sentence": 0.6, "most frequent answer": 0.6}
    assert [row["question"] for row in rows] == QUESTIONS
    assert score.answers == 5 and score.score == sum(row["answer"].strip() == row["reference"] for row in rows) / 5
    with pytest.raises(MiniGPTError, match="no conversation"):
        score_answers(model, tokenizer, [], "exact")
    with pytest.raises(MiniGPTError, match="score is 'f1'"):
        score_answers(model, tokenizer, conversations, "f1")


def test_a_question_that_fills_the_context_is_an_error(model, tokenizer):
    with pytest.raises(MiniGPTError, match="the context of the model is 128"):
        generate_answers(model, tokenizer, [[{"role": "user", "content": "a" * 200}]], 20)


def test_characters_that_the_tokenizer_lacks_make_an_answer_wrong_and_a_question_an_error(model):
    tokenizer = with_chat_tokens(character_tokenizer(["user assistant ab\n"]))

    def conversation(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    score, rows = score_answers(model, tokenizer, [conversation("a", "b\u00e9\r"), conversation("a", "b")], "exact")
    assert (score.answers, rows[0]["reference"]) == (2, "b\u00e9\r")
    with pytest.raises(MiniGPTError, match=r"conversation 2: .*'é'"):
        score_answers(model, tokenizer, [conversation("a", "b"), conversation("\u00e9", "b")], "exact")


def test_the_command_prints_the_score_and_writes_the_answers(model, tokenizer, tmp_path, capsys):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, REFERENCES, strict=True)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["evaluate", str(tmp_path / "model"), "--data", str(tmp_path / "test.jsonl"), "--score", "exact"]
    assert main([*argv, "--answers", str(tmp_path / "answers.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "exact" in out and "95 % interval" in out and "most frequent answer" in out and "of 5 answers" in out
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in answers] == REFERENCES
    score, _ = minigpt_hf.api.score_answers(tmp_path / "model", tmp_path / "test.jsonl", "exact")
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baselines"] == score.baselines
    for flags, message in (
        (["--stride", "2"], "stride does not apply"),
        (["--max_characters", "2"], "max_characters does not apply"),
    ):
        assert main([*argv, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main([*argv[:-2], "--answers", "x"]) == 2
    assert "--answers requires --score" in capsys.readouterr().err
