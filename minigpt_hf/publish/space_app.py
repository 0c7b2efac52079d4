"""Demo of a language model in Gradio: a chat if its tokenizer has a chat template, otherwise a text is continued.

This file is a program of its own: `minigpt push --space` uploads it as `app.py`, with the name of the model and
the system message of its training.
"""

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
longest = model.config.max_position_embeddings // 2  # tokens of the prompt and of the generated text
options = [
    gr.Slider(1, min(longest, 500), value=min(longest, 100), step=1, label="Maximum number of new tokens"),
    gr.Slider(0, 2, value=0.8, step=0.1, label="Temperature (0: greedy)"),
]


def generate(ids: torch.Tensor, max_new_tokens: int, temperature: float) -> Iterator[str]:
    """Yield the text generated so far, after each token.

    Args:
        ids: Token ids of the prompt [1, T]; only the last ones are used if there are too many.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600, skip_special_tokens=True)
    ids = ids[:, -longest:]
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
    text = prompt or tokenizer.bos_token or tokenizer.eos_token
    try:
        # The name of a special token in the prompt is text, as in training.
        ids = tokenizer(text, return_tensors="pt", split_special_tokens=bool(prompt)).input_ids
    except Exception as error:  # character tokenizers reject characters that did not occur in training
        raise gr.Error(f"the text has a character that the model does not know ({error})") from error
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
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    yield from generate(inputs["input_ids"], max_new_tokens, temperature)


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
