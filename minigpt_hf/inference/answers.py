"""Generate the answers of conversations and compare them with the given ones.

The last answer of each conversation is generated from the messages before it, by greedy decoding. Scores, with 95 %
intervals:

    exact   share of answers that equal the reference, without surrounding white space (Wilson interval)
    chrf    chrF2 of sacrebleu (Popović 2015), 0 to 100 (bootstrap over conversations)
    bleu    BLEU of sacrebleu (Papineni et al. 2002; Post 2018), 0 to 100 (bootstrap over conversations)
    rouge   mean ROUGE-L F1 of rouge-score (Lin 2004) on words of any script, 0 to 1 (normal approximation)

The same scores of three trivial answers show what a score is worth: the question itself, its first sentence, and the most
frequent answer of the data.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_format import Message, last_question
from ..errors import MiniGPTError
from .evaluation import longest_context
from .generation import encode_prompt, only_settings

SPARE_TOKENS = 32  # tokens by which an answer may exceed the longest reference before it is ended
BOOTSTRAP_SAMPLES = 1000
Z95 = 1.959964  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class AnswerScore:
    """Scores of generated answers.

    Attributes:
        metric: `exact`, `chrf`, `bleu` or `rouge`.
        score: Score of the model.
        low, high: 95 % interval of the score.
        ended: Share of answers that the model ended itself.
        answers: Number of answers.
        baselines: Scores of trivial answers, by name.
    """

    metric: str
    score: float
    low: float
    high: float
    ended: float
    answers: int
    baselines: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[list[Message]],
    metric: str,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda answers: None,
) -> tuple[AnswerScore, list[dict[str, str]]]:
    """Generate the last answer of each conversation and score it.

    Args:
        metric: A key of `METRICS`.
        batch_size: Answers that are generated together.
        progress: Called with the number of answers after each batch.

    Returns:
        The score, and for each conversation `question` (the last one), `reference` and `answer`.

    Raises:
        MiniGPTError: if the metric is unknown, gives 0 to the references themselves, or its package is not installed, or
            there is no conversation.
    """
    if metric not in METRICS:
        raise MiniGPTError(f"score is {metric!r}: give one of {', '.join(METRICS)}")
    prompts, references = [], []
    for messages in conversations:
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompts.append(messages[:last])
        references.append(messages[last]["content"])
    if not prompts:
        raise MiniGPTError("there is no conversation to answer")
    compute = METRICS[metric]()
    if compute(references, references)[0] == 0:  # BLEU without a sequence of four words
        raise MiniGPTError(
            f"--score {metric} gives 0 even to the references themselves, which are too short or not divided by spaces: give "
            "--score chrf or exact"
        )
    longest = max(_length(tokenizer, text) for text in references)
    answers, ended = generate_answers(model, tokenizer, prompts, longest + SPARE_TOKENS, batch_size, progress)
    questions = [last_question(prompt) for prompt in prompts]
    (frequent, _), *_ = Counter(references).most_common(1)
    trivial = {
        "question": questions,
        "first sentence": [re.split(r"(?<=[.!?])\s", question.strip(), maxsplit=1)[0] for question in questions],
        "most frequent answer": [frequent] * len(references),
    }
    score, low, high = compute(answers, references)
    result = AnswerScore(
        metric=metric,
        score=score,
        low=low,
        high=high,
        ended=ended / len(answers),
        answers=len(answers),
        baselines={name: compute(texts, references)[0] for name, texts in trivial.items()},
    )
    rows = [
        {"question": question, "reference": reference, "answer": answer}
        for question, reference, answer in zip(questions, references, answers, strict=True)
    ]
    return result, rows


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of tokens of a text; of characters, if it has some that the tokenizer lacks."""
    try:
        return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
    except Exception:  # the bare `Exception` that `tokenizers` raises for a word without an id
        return len(text)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda answers: None,
) -> tuple[list[str], int]:
    """Generate an answer to each prompt by greedy decoding; the settings of `model.generation_config` do not apply.

    Prompts of similar length are padded on the left and answered together. Those that leave less than `max_new_tokens` in
    the context are answered alone, because padding would shorten the answers of others.

    Returns:
        The answers, and how many of them the model ended itself.

    Raises:
        MiniGPTError: if a prompt leaves no space in the context of the model, or no token ends an answer.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_prompt(tokenizer, prompt).input_ids[0])
        except MiniGPTError as error:
            raise MiniGPTError(f"conversation {number:,}: {error}") from error
    context, longest = longest_context(model), max(map(len, encoded))
    if longest >= context:
        raise MiniGPTError(f"a prompt has {longest:,} tokens and the context of the model is {context:,}: shorten it")
    eos = (
        tokenizer.eos_token_id if model.generation_config.eos_token_id is None else model.generation_config.eos_token_id
    )
    if eos is None:
        raise MiniGPTError("neither generation_config.json nor the tokenizer names the EOS token that ends an answer")
    ends = torch.tensor(eos if isinstance(eos, list) else [eos], device=model.device)
    padding = int(ends[0]) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    together = [number for number in order if len(encoded[number]) + max_new_tokens <= context]
    batches = [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    batches += [[number] for number in order[len(together) :]]
    answers, ended = [""] * len(prompts), 0
    with only_settings(model, eos_token_id=eos, pad_token_id=padding, use_cache=True):
        for batch in batches:
            width = len(encoded[batch[-1]])
            ids = torch.full((len(batch), width), padding)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, number in enumerate(batch):
                ids[row, width - len(encoded[number]) :] = encoded[number]
                mask[row, width - len(encoded[number]) :] = 1
            generated = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=min(max_new_tokens, context - width),
            )[:, width:]
            ended += int(torch.isin(generated, ends).any(dim=1).sum())
            for number, text in zip(batch, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
                answers[number] = text
            progress(len(batch))
    return answers, ended


# -- metrics: (answers, references) -> score, low, high ---------------------------------------------------------------

Metric = Callable[[list[str], list[str]], tuple[float, float, float]]


def _exact() -> Metric:
    def compute(answers: list[str], references: list[str]) -> tuple[float, float, float]:
        count = len(answers)
        share = sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True)) / count
        center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
        half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
        return share, max(0.0, center - half), min(1.0, center + half)

    return compute


def _sacrebleu(name: str) -> Callable[[], Metric]:
    def create() -> Metric:
        try:
            from sacrebleu import metrics, significance
        except ImportError as error:
            raise MiniGPTError(f"--score {name.lower()} requires sacrebleu: `pip install sacrebleu`") from error

        def compute(answers: list[str], references: list[str]) -> tuple[float, float, float]:
            metric = getattr(metrics, name)()
            score = metric.corpus_score(answers, [references]).score
            # The interval of sacrebleu, whose own computation fails if some samples have a score of 0.
            statistics = metric._extract_corpus_statistics(answers, [references])
            _, samples = significance._bootstrap_resample(statistics, metric, BOOTSTRAP_SAMPLES)
            mean, half = significance.estimate_ci(np.array([sample.score for sample in samples]))
            low, high = np.clip([mean - half, mean + half], 0, 100).tolist()
            return score, low, high

        return compute

    return create


def _rouge() -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MiniGPTError("--score rouge requires rouge-score: `pip install rouge-score`") from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def compute(answers: list[str], references: list[str]) -> tuple[float, float, float]:
        values = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(answers, references, strict=True)]
        mean, half = float(np.mean(values)), Z95 * float(np.std(values)) / math.sqrt(len(values))
        return mean, max(0.0, mean - half), min(1.0, mean + half)

    return compute


class _Words:
    """Tokenizer for rouge-score, whose own one discards all letters but a to z; on ASCII text both are equal.

    A word is a sequence of letters, digits and combining marks, such as vowel signs. Text without spaces is one word.
    """

    def tokenize(self, text: str) -> list[str]:
        return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower()).split()


METRICS: dict[str, Callable[[], Metric]] = {
    "exact": _exact,
    "chrf": _sacrebleu("CHRF"),
    "bleu": _sacrebleu("BLEU"),
    "rouge": _rouge,
}
