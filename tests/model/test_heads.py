"""The classification and question answering heads use the base model, and their gradients reach it."""

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests.conftest import random_ids, tiny_model

IDS = random_ids(2, 10)
HEADS = [
    (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}, "score"),
    (AutoModelForTokenClassification, {"labels": IDS % 3}, "score"),
    (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        "qa_outputs",
    ),
]


@pytest.mark.parametrize(("auto_class", "labels", "head"), HEADS)
def test_a_head_loads_the_pretrained_base_model(auto_class, labels, head, tmp_path):
    language_model = tiny_model()
    language_model.save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path, num_labels=3)
    hidden_states = language_model.model(IDS).last_hidden_state
    torch.testing.assert_close(model.model(IDS).last_hidden_state, hidden_states)

    output = model(IDS, **labels)
    scores = getattr(model, head)(hidden_states)
    if auto_class is AutoModelForSequenceClassification:
        torch.testing.assert_close(output.logits, scores[:, -1])
    elif auto_class is AutoModelForTokenClassification:
        torch.testing.assert_close(output.logits, scores)
    else:
        torch.testing.assert_close(torch.stack([output.start_logits, output.end_logits], -1), scores)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
