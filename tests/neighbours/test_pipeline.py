"""`transformers.pipeline` for text generation, and for each head for which a pipeline exists."""

import pytest
import torch
from transformers import pipeline
from transformers.pipelines import SUPPORTED_TASKS

from minigpt_hf import MiniGPTForSequenceClassification, MiniGPTForTokenClassification, MiniGPTModel

LABELS = {0: "header", 1: "body", 2: "other"}


@pytest.fixture
def head(trained, tokenizer, tmp_path):
    """Function that saves the trained base model with a new head, and returns the model and its folder."""

    def make(model_class):
        torch.manual_seed(0)
        model = model_class.from_pretrained(trained, num_labels=3, id2label=LABELS).eval()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return make


def test_text_generation_equals_generate_single_and_batched(trained, model, tokenizer, prompts):
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        expected.append(tokenizer.decode(model.generate(**ids, **options)[0], skip_special_tokens=True))
    generator = pipeline("text-generation", str(trained))
    for batch_size in (1, 8):
        rows = generator(prompts, batch_size=batch_size, **options)
        assert [row[0]["generated_text"] for row in rows] == expected
    assert len(set(expected)) == 20


def test_text_generation_samples_by_default_with_the_saved_generation_config(trained):
    generator = pipeline("text-generation", str(trained))
    settings = generator.model.generation_config
    assert (settings.do_sample, settings.temperature) == (True, 0.8)
    assert len({generator("def ", max_new_tokens=20)[0]["generated_text"] for _ in range(5)}) > 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_text_classification_gives_the_probabilities_of_the_head(head, tokenizer, prompts, batch_size):
    model, folder = head(MiniGPTForSequenceClassification)
    rows = pipeline("text-classification", folder)(prompts, batch_size=batch_size, top_k=None)
    for prompt, row in zip(prompts, rows, strict=True):
        probabilities = model(**tokenizer(prompt, return_tensors="pt")).logits[0].softmax(-1)
        scores = {entry["label"]: entry["score"] for entry in row}
        assert scores == pytest.approx({LABELS[i]: p.item() for i, p in enumerate(probabilities)}, abs=1e-5)


def test_token_classification_labels_each_token(head, tokenizer, prompts):
    model, folder = head(MiniGPTForTokenClassification)
    for prompt, row in zip(prompts, pipeline("token-classification", folder)(prompts), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        probabilities, labels = model(ids).logits[0].softmax(-1).max(-1)
        assert [entry["entity"] for entry in row] == [LABELS[label.item()] for label in labels]
        assert [entry["score"] for entry in row] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert [entry["word"] for entry in row] == tokenizer.convert_ids_to_tokens(ids[0].tolist())


def test_feature_extraction_gives_the_hidden_states_of_the_base_model(trained, tokenizer, prompts):
    base_model = MiniGPTModel.from_pretrained(trained).eval()
    for prompt, features in zip(prompts, pipeline("feature-extraction", str(trained))(prompts), strict=True):
        expected = base_model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.tensor(features), expected, atol=1e-5, rtol=0)


def test_question_answering_has_no_pipeline():
    """transformers 5 removed `question-answering`. If this fails, add a test for it."""
    assert "question-answering" not in SUPPORTED_TASKS
