"""Demo of a language model in Gradio: a chat if its tokenizer has a chat template, otherwise a text is continued.

This file is a program of its own: `minigpt push --space` uploads it as `app.py`, with the name of the model and
the system message of its training.
"""

import re
from collections.abc import Iterator
from threading import Thread

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL = "USER/NAME"
REVISION = "main"
SYSTEM = ""

tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(MODEL, revision=REVISION, trust_remote_code=False, use_safetensors=True)
longest = model.config.max_position_embeddings // 2  # tokens of the prompt, and of the generated text
special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
options = [
    gr.Slider(1, min(longest, 500), value=min(longest, 100), step=1, label="Maximum number of new tokens"),
    gr.Slider(0, 2, value=0.8, step=0.1, label="Temperature (0: greedy)"),
]


def encode(text: str, add_special_tokens: bool = False) -> list[int]:
    """Return the token ids of a text, in which strings such as `<|endoftext|>` are ordinary text, as in training."""
    settings = {"add_special_tokens": add_special_tokens, "split_special_tokens": True}
    try:
        encoding = tokenizer(text, return_special_tokens_mask=True, **settings)
    except Exception as error:  # character tokenizers reject characters that did not occur in training
        raise gr.Error(f"the text has a character that the model does not know ({error})") from error
    ids, is_added = encoding.input_ids, encoding.special_tokens_mask
    # Some tokenizers append tokens to every text, after which a model would not continue.
    length = max((i for i, added in enumerate(is_added) if not added), default=len(ids) - 1) + 1
    return ids[:length]


def encode_messages(messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation. Only those of the template are special tokens."""
    marks = {f"\ue000{index}\ue001": message["content"] for index, message in enumerate(messages)}
    marked = [{"role": message["role"], "content": mark} for message, mark in zip(messages, marks, strict=True)]
    template = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    longest_first = sorted(special_tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", template) if special_tokens else [template]
    ids: list[int] = []
    for part in parts:
        text = re.sub("\ue000[0-9]+\ue001", lambda mark: marks[mark[0]], part)
        ids += [tokenizer.convert_tokens_to_ids(part)] if part in special_tokens else encode(text)
    return ids


def generate(prompt: list[int], max_new_tokens: int, temperature: float) -> Iterator[str]:
    """Yield the text generated so far, after each token.

    Args:
        prompt: Token ids.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600, skip_special_tokens=True)
    ids = torch.tensor([prompt])
    settings = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    settings |= {"max_new_tokens": max_new_tokens, "attention_mask": torch.ones_like(ids), "streamer": streamer}
    one = {"num_return_sequences": 1, "num_beams": 1}  # one text is streamed, whatever generation_config.json has
    Thread(target=model.generate, args=(ids,), kwargs=settings | one, daemon=True).start()
    text = ""
    for piece in streamer:
        text += piece
        yield text


def continue_text(prompt: str, max_new_tokens: int, temperature: float) -> Iterator[str]:
    """Yield the prompt and its continuation so far. An empty prompt is the beginning of a document."""
    ids = encode(prompt, add_special_tokens=True)
    if not prompt:
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if len(ids) > longest:
        gr.Warning(f"the text has {len(ids):,} tokens; the model reads only the last {longest:,}")
    ids = ids[-longest:]
    for continuation in generate(ids, max_new_tokens, temperature):
        yield prompt + continuation


def text_of(content: str | list[dict]) -> str:
    """Return the text of a message, which Gradio passes as parts in the page and as a string in the API."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def reply(message: str, history: list[dict], max_new_tokens: int, temperature: float) -> Iterator[str]:
    """Yield the reply so far.

    Args:
        history: Earlier messages.
    """
    system = [{"role": "system", "content": SYSTEM}] if SYSTEM else []
    earlier = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
    messages = [*system, *earlier, {"role": "user", "content": message}]
    forgotten = 0
    while len(ids := encode_messages(messages)) > longest:
        if len(messages) <= len(system) + 2:
            raise gr.Error(f"the model reads at most {longest:,} tokens; with this message there are {len(ids):,}")
        del messages[len(system) : len(system) + 2]
        forgotten += 1
    if forgotten:
        gr.Warning(f"number of earlier questions that no longer fit into the context and are forgotten: {forgotten}")
    yield from generate(ids, max_new_tokens, temperature)


if tokenizer.chat_template:
    demo = gr.ChatInterface(reply, additional_inputs=options, title=MODEL, api_name="chat")
else:
    demo = gr.Interface(
        continue_text,
        [gr.Textbox(label="Text", lines=4), *options],
        gr.Textbox(label="Continuation", lines=12),
        title=MODEL,
        flagging_mode="never",
        api_name="continue",
    )

if __name__ == "__main__":
    demo.launch()
