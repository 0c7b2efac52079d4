"""Every token is scored exactly once, with the stated context."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.inference.evaluation import IGNORE_INDEX, evaluate_texts, score_documents, windows
from tests.conftest import SHAKESPEARE, random_ids, tiny_model


def document_windows(length: int, block_size: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """The windows of the document 1, 2, …, length with the BOS token 0."""
    pairs = windows(np.arange(1, length + 1), 0, block_size, stride)
    return [(inputs.tolist(), labels.tolist()) for inputs, labels in pairs]


def test_windows_computed_manually():
    assert document_windows(3, 2, 2) == [([0, 1], [1, 2]), ([2], [3])]
    assert document_windows(3, 2, 1) == [([0, 1], [1, 2]), ([1, 2], [IGNORE_INDEX, 3])]
    assert document_windows(2, 2, 2) == [([0, 1], [1, 2])]
    assert document_windows(0, 2, 2) == []


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 60), block_size=st.integers(1, 12), data=st.data())
def test_each_token_is_scored_once_and_predicted_by_the_one_before_it(length, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    scored = []
    for inputs, labels in document_windows(length, block_size, stride):
        assert len(inputs) <= block_size
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        for place, label in enumerate(labels):
            if label != IGNORE_INDEX:
                assert inputs[place] == label - 1
                scored.append(label)
    assert scored == list(range(1, length + 1))


@pytest.mark.parametrize("stride", [None, 5])
def test_the_sum_equals_that_of_single_windows(stride):
    model = tiny_model()
    documents = [random_ids(1, n + 50)[0, 50:].numpy() for n in (40, 16, 1, 0, 23)]
    nats, tokens, number = score_documents(model, documents, 0, 16, stride, batch_size=3)
    expected = 0.0
    for document in documents:
        for inputs, labels in windows(document, 0, 16, stride or 16):
            logits = model(torch.tensor(inputs)[None]).logits[0]
            expected += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    assert (tokens, number) == (80, 4)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_scores_of_all_ranks_add_up_to_that_of_one_process():
    model, documents = tiny_model(), [random_ids(1, 100)[0].numpy()]
    expected = score_documents(model, documents, 0, 8, batch_size=2)
    shares = [score_documents(model, documents, 0, 8, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert sum(share[0] for share in shares) == pytest.approx(expected[0], rel=1e-12)
    assert sum(share[1] for share in shares) == expected[1] == 100


def test_a_uniform_model_has_log2_of_the_vocabulary_bits_per_byte():
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=258)
    model.lm_head.weight.data.zero_()  # tied: all logits are 0
    score = evaluate_texts(model, tokenizer, ["héllo", "", "wörld!"], block_size=4)
    assert score.loss == pytest.approx(math.log(258), rel=1e-6)
    assert score.perplexity == pytest.approx(258, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(258), rel=1e-6)  # a token is a byte
    assert (score.tokens, score.bytes, score.documents) == (13, 13, 2)
    assert (score.block_size, score.stride) == (4, 4)


def test_any_causal_lm_can_be_scored(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    character_tokenizer(["hello world"]).save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    score = evaluate_texts(model, tokenizer, ["hello world"])
    ids = torch.tensor([[0, *tokenizer("hello world").input_ids]])
    assert score.block_size == 16
    assert score.loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_evaluation_restores_the_training_mode_and_rejects_invalid_arguments():
    model = tiny_model().train()
    evaluate_texts(model, character_tokenizer(["ab"]), ["ab"])
    assert model.training
    with pytest.raises(ValueError, match="no text to evaluate"):
        evaluate_texts(model, character_tokenizer(["ab"]), [""])
    with pytest.raises(ValueError, match="windows of 1 to 64 tokens"):
        evaluate_texts(model, character_tokenizer(["ab"]), ["ab"], block_size=65)
    with pytest.raises(ValueError, match="stride is 5"):
        evaluate_texts(model, character_tokenizer(["ab"]), ["ab"], block_size=4, stride=5)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not on this machine")
def test_the_last_tenth_of_tiny_shakespeare_has_111540_characters():
    from minigpt_hf.data.corpus import load_corpus

    corpus = load_corpus(str(SHAKESPEARE))
    tokenizer = character_tokenizer([*corpus.train, *corpus.validation])
    assert len(tokenizer) == 65 + 2
    score = evaluate_texts(tiny_model(), tokenizer, corpus.validation.head(5000), block_size=64)
    assert (corpus.validation.characters, score.tokens) == (111_540, 5000)


class ConstantLogits(torch.nn.Module):
    """Predicts token 1 with a constant logit; all others are 0."""

    def __init__(self, logit: float):
        super().__init__()
        self.config = tiny_model(vocab_size=258).config
        self.logits = torch.nn.Parameter(torch.zeros(258))
        self.logits.data[1] = logit

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_loss_whose_exponential_overflows_has_an_infinite_perplexity():
    score = evaluate_texts(ConstantLogits(1000.0), byte_tokenizer(), ["text"], block_size=4)
    assert score.loss == pytest.approx(1000.0, rel=1e-6)
    assert score.perplexity == math.inf
    assert score.bits_per_byte == pytest.approx(1000.0 / math.log(2), rel=1e-6)


def test_a_model_with_non_finite_losses_is_rejected():
    for logit in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            evaluate_texts(ConstantLogits(logit), byte_tokenizer(), ["text"], block_size=4)
