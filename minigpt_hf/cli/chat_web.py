"""`minigpt chat --web`: the conversation, or the continuation of a text, in a browser, with Gradio.

The server listens on the loopback interface unless another host is given. Analytics are disabled, and a content security
policy forbids the page to contact any other server.
"""

import html
import inspect
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import MiniGPTError
from .chat import FORGOTTEN, fitting
from .streaming import generated_pieces

if TYPE_CHECKING:
    from gradio import Blocks, Chatbot
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UPDATE_SECONDS = 0.05  # between two updates of the page
MAX_NEW_TOKENS = 2048  # maximum of the slider, unless more are given
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
CSS = """
footer { display: none !important }
.gradio-container { max-width: 60rem !important; width: 100%; margin: 0 auto }
.message .md { white-space: pre-wrap }
"""
# Gradio scrolls only text boxes that cannot be edited. The text is not scrolled while it is edited.
SCROLL = (
    "() => { const text = document.querySelector('#text textarea');"
    " if (text !== document.activeElement) text.scrollTop = text.scrollHeight }"
)
Message = dict[str, Any]


def serve(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    system: str | None,
    seed: int | None,
    options: dict[str, Any],
    host: str,
    port: int | None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model, tokenizer: As returned by `load`.
        name: Title of the page.
        system: Initial system message.
        seed: Initial seed; None: random.
        options: Attributes of `GenerationConfig`. The page shows some of them, which can be changed there.
        host, port: Where the server listens. Default port: the first free one from 7860 on.

    Raises:
        MiniGPTError: if Gradio is not installed, or host and port cannot be used.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MiniGPTError("--web requires Gradio: `pip install gradio`") from error
    from starlette.middleware import Middleware

    page = Page(model, tokenizer, options)
    demo = page.chat(name, system, seed) if tokenizer.chat_template else page.continuation(name, seed)
    try:
        _, url, _ = demo.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            theme=_theme(),
            css=CSS,
            app_kwargs={"middleware": [Middleware(ContentSecurityPolicy)]},
        )
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise MiniGPTError(f"no server can listen on {where} ({error}): give another --port or --host") from error
    print(f"{url}  (Ctrl-C ends the server)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        demo.close()


def _theme() -> Any:
    """The default theme, with fonts of the system, and secondary text of higher contrast."""
    import gradio

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    colors = {"block_info_text_color": "*neutral_600", "block_title_text_color": "*neutral_700"}
    colors |= {"block_info_text_color_dark": "*neutral_300", "block_title_text_color_dark": "*neutral_200"}
    return gradio.themes.Default(primary_hue="indigo", **fonts).set(**colors)


class ContentSecurityPolicy:
    """ASGI middleware that adds the content security policy to every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class Page:
    """The page of a model.

    Args:
        options: Attributes of `GenerationConfig` that the page does not show, and initial values of those that it shows.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]):
        from ..inference.evaluation import longest_context

        self.model, self.tokenizer = model, tokenizer
        self.defaults = {**model.generation_config.to_dict(), **options}
        for name, least, most in (("max_new_tokens", 1, math.inf), ("temperature", 0, math.inf), ("top_p", 0, 1)):
            if not isinstance(value := options.get(name, 1), int | float) or isinstance(value, bool):
                raise MiniGPTError(f"--{name} {value}: a number is required")
            if not least <= value <= most or math.isinf(value):
                limit = f"from {least} to {most}" if math.isfinite(most) else f"finite and at least {least}"
                raise MiniGPTError(f"--{name} {value}: must be {limit}")
        if "max_length" in options:
            raise MiniGPTError("--max_length is not supported with --web: give --max_new_tokens")
        shown = ("max_new_tokens", "do_sample", "temperature", "top_p")
        self.options = {name: value for name, value in options.items() if name not in shown}
        self.context = longest_context(model)

    def chat(self, name: str, system: str | None, seed: int | None) -> "Blocks":
        """Return the page of a model that answers."""
        import gradio

        chatbot = gradio.Chatbot(
            render_markdown=False,
            latex_delimiters=[],
            height="65vh",
            buttons=[],
            show_label=False,
            placeholder="Ask a question.",
        )
        return gradio.ChatInterface(
            self.answer,
            chatbot=_with_plain_text(chatbot),
            title=name,
            description=self.description(),
            additional_inputs=[
                gradio.Textbox(system or "", label="System message", info="Precedes the conversation.", lines=1),
                *self.sampling(seed),
            ],
            additional_inputs_accordion=gradio.Accordion("Settings", open=False),
            flagging_mode="never",
            analytics_enabled=False,
            api_name="chat",
        )

    def continuation(self, name: str, seed: int | None) -> "Blocks":
        """Return the page of a model without a chat template."""
        import gradio

        with gradio.Blocks(title=name, analytics_enabled=False) as demo:
            gradio.Markdown(f"<center><h1>{name}</h1></center>\n\n{self.description()}")
            with gradio.Tab("Continuation"):
                text = gradio.Textbox(label="Text", lines=16, max_lines=16, autofocus=True, elem_id="text")
                with gradio.Row():
                    start = gradio.Button("Continue", variant="primary", min_width=80)
                    stop = gradio.Button("Stop", min_width=80)
                    reset = gradio.Button("Reset", min_width=80)
                with gradio.Accordion("Settings", open=False):
                    settings = self.sampling(seed)
            running = start.click(self.continued, [text, *settings], text, api_name="continue", show_progress="minimal")
            text.change(None, js=SCROLL)
            stop.click(None, cancels=[running])
            reset.click(lambda: "", None, text, cancels=[running], api_visibility="private")
        return demo

    def description(self) -> str:
        count = self.model.num_parameters()
        what = "answers questions" if self.tokenizer.chat_template else "continues texts"
        return f"<center>{count:,} parameters · context of {self.context:,} tokens · {what} on this machine</center>"

    def sampling(self, seed: int | None) -> list[Any]:
        """Return the inputs of `generation_options`, with the defaults of the model."""
        import gradio

        default, longest = self.defaults, min(self.context - 1, MAX_NEW_TOKENS)
        new_tokens = default.get("max_new_tokens") or min(512, self.context // 2)
        # A given temperature or top p of 0 is used, and not replaced by that of transformers.
        unset = {"temperature": 1.0, "top_p": 1.0}
        temperature, top_p = (value if default.get(name) is None else default[name] for name, value in unset.items())
        temperature = temperature if default.get("do_sample") else 0
        # The ranges include the initial values: Gradio rejects others.
        most, highest, lowest = max(longest, new_tokens), max(2, temperature), min(0.05, top_p)
        return [
            gradio.Slider(1, most, new_tokens, step=1, label="Maximum number of new tokens"),
            gradio.Slider(0, highest, temperature, step=0.05, label="Temperature", info="0: the most probable token"),
            gradio.Slider(lowest, 1, top_p, step=0.05, label="Top p", info="1: all tokens"),
            gradio.Textbox("" if seed is None else str(seed), label="Seed", info="Empty: random", max_lines=1),
        ]

    def generation_options(self, max_new_tokens: int, temperature: float, top_p: float, seed: str) -> dict[str, Any]:
        """Return the keywords of `generate` for the values of the inputs.

        Raises:
            MiniGPTError: if the seed is not a number.
        """
        if seed.strip() and not seed.strip().isdecimal():
            raise MiniGPTError(f"the seed is {seed!r}: an integer is required, or nothing")
        sampling = {"temperature": temperature, "top_p": top_p} if temperature else {"temperature": None, "top_p": None}
        settings = {"max_new_tokens": int(max_new_tokens), "do_sample": bool(temperature), **sampling}
        return {**self.options, **settings, "seed": int(seed) if seed.strip() else None}

    def answer(self, question: str, history: list[Message], system: str, *settings: Any) -> Iterator[str]:
        """Yield the answer so far.

        Args:
            history: The messages before the question, without the system message.
            settings: Values of `sampling`.
        """
        import gradio

        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [{"role": each["role"], "content": _text_of(each["content"])} for each in history]
        messages += [{"role": "user", "content": question}]
        with _shown_errors():
            options = self.generation_options(*settings)
            messages, forgotten = fitting(self.model, self.tokenizer, messages, options["max_new_tokens"])
            if forgotten:
                gradio.Info(FORGOTTEN.format(forgotten))
            yield from self.text(messages, options)

    def continued(self, text: str, *settings: Any) -> Iterator[str]:
        """Yield the text and its continuation so far."""
        with _shown_errors():
            for continuation in self.text(text, self.generation_options(*settings)):
                yield text + continuation

    def text(self, prompt: str | list[Message], options: dict[str, Any]) -> Iterator[str]:
        """Yield the generated text so far, at most every `UPDATE_SECONDS`."""
        text, updated = "", 0.0
        for piece in generated_pieces(self.model, self.tokenizer, prompt, **options):
            text += piece
            if time.monotonic() - updated > UPDATE_SECONDS:
                updated = time.monotonic()
                yield text
        yield text


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Show invalid input in the page."""
    import gradio

    try:
        yield
    except MiniGPTError as error:
        raise gradio.Error(str(error), title="The text cannot be generated", print_exception=False) from error


def _with_plain_text(chatbot: "Chatbot") -> "Chatbot":
    """Let a chatbot show text as it is. Without Markdown, Gradio still renders HTML and removes indentation.

    Methods of the object are replaced, because Gradio writes a stub next to the module of a subclass.
    """
    preprocess, postprocess = chatbot.preprocess, chatbot.postprocess
    chatbot.preprocess = lambda payload: _mapped(html.unescape, preprocess(payload))
    chatbot.postprocess = lambda messages: postprocess(_mapped(_escaped, messages))
    return chatbot


def _mapped(function: Callable[[str], str], messages: list[Message] | None) -> list[Message]:
    """Apply a function to the content of messages."""
    return [{**each, "content": function(_text_of(each["content"]))} for each in messages or []]


def _escaped(text: str) -> str:
    """Return HTML that is displayed as a text and has no white space that Gradio would remove."""
    text = html.escape(text, quote=False)
    if inspect.cleandoc(text) != text:
        text = re.sub(r"\s", lambda space: f"&#{ord(space[0])};", text)
    return text


def _text_of(content: Any) -> str:
    """Return the text of a message, which Gradio passes as parts in the page and as a string in the API."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")
