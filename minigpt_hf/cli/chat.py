"""`minigpt chat`: a conversation with a model in the terminal or, with `--web`, in a browser."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MiniGPTError
from . import print_error
from .parser import Parser, generation_options, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message, and forget the conversation; without TEXT: none
/save FILE      append the conversation to a JSON Lines file, which `minigpt train --chat` reads
/exit           end, as Ctrl-D does; Ctrl-C stops an answer
//              start of a message that begins with a slash"""

NO_TEMPLATE = "the model has no chat template, so a system message has no effect: omit it"
FORGOTTEN = "number of earlier questions that no longer fit into the context and are forgotten: {}"


def parser() -> Parser:
    """The arguments of the command, without the options of `GenerationConfig`."""
    parser = Parser(
        "chat",
        epilog="Every other flag is an option of transformers' GenerationConfig: --max_new_tokens 300 --do_sample true "
        "--temperature 0.8 --top_p 0.9 …",
    )
    parser.add_argument("model", help="model folder or Hub id; a model without a chat template continues each text")
    parser.add_argument("--system", help="system message (default: that of --system in training)")
    parser.add_argument("--seed", type=int, help="seed of sampling")
    parser.add_argument("--web", action="store_true", help="serve a page for browsers instead (extra `web`: Gradio)")
    parser.add_argument("--host", help="with --web: address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="with --web: port (default: the first free one from 7860 on)")
    parser.add_argument("--trust_remote_code", action="store_true", help="execute Python code of the model repository")
    return parser


def run(argv: list[str]) -> None:
    """Read messages from standard input and answer each."""
    args, rest = parser().parse_known_args(argv)
    options = generation_options(rest)
    if options.keys() & {"num_return_sequences", "num_beams"}:
        raise MiniGPTError(
            "num_return_sequences and num_beams are not supported: one answer is printed as it is generated"
        )
    options |= {"num_return_sequences": 1, "num_beams": 1}  # whatever generation_config.json has

    for flag, value in (("--host", args.host), ("--port", args.port)):
        if value is not None and not args.web:
            raise MiniGPTError(f"{flag} requires --web")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise MiniGPTError(f"--port {args.port}: a number from 1 to 65535 is required")

    from transformers import set_seed

    from ..inference.generation import load, warn_of_unused_options
    from ..publish.card import report_system_messages
    from ..training_text import recipe_of
    from ..trust import checked_folder

    quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)
    warn_of_unused_options(model, options, None if args.web else args.seed)  # the page can change `do_sample`
    if args.system is not None and not tokenizer.chat_template:
        raise MiniGPTError(f"--system: {NO_TEMPLATE}")
    folder = checked_folder(args.model, args.trust_remote_code)  # for a Hub id, its cached snapshot
    system = recipe_of(folder).get("system") if args.system is None else args.system
    if args.system is None and tokenizer.chat_template:
        report_system_messages(folder, "this conversation")
    if args.web:
        from ..trust import read_metadata
        from .chat_web import serve

        name = str(read_metadata(folder).get("name") or args.model)
        host = args.host or "127.0.0.1"
        serve(model, tokenizer, name, system, args.seed, options, host, args.port)
        return
    if args.seed is not None:
        set_seed(args.seed)
    if not tokenizer.chat_template:
        print("The model has no chat template: it continues each text. /exit ends.", file=sys.stderr)
    else:
        print("/help lists the commands.", file=sys.stderr)
    chat = Chat(model, tokenizer, system, options)
    while True:
        try:
            text = input("> ").removesuffix("\r")  # Windows line ends of a file
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if not chat.execute(text):
                return
        except (MiniGPTError, OSError) as error:
            print_error("chat", error)


class Chat:
    """A conversation.

    Args:
        model, tokenizer: As returned by `load`.
        system: System message, if any.
        options: Attributes of `GenerationConfig`.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None,
        options: dict[str, Any],
    ):
        from ..inference.evaluation import longest_context

        self.model, self.tokenizer, self.options = model, tokenizer, options
        if "max_length" not in options:
            # By default half of a short context remains for the conversation.
            default = model.generation_config.max_new_tokens or min(512, max(1, longest_context(model) // 2))
            options.setdefault("max_new_tokens", default)
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def execute(self, text: str) -> bool:
        """Execute a command or answer a message. Returns whether to read another one.

        Raises:
            MiniGPTError: if the command is unknown, or the message cannot be answered; the conversation is unchanged.
        """
        command, _, argument = text.partition(" ")
        argument = argument.strip()
        if not text.startswith("/") or text.startswith("//"):
            if text.strip():
                self.answer(text[1:] if text.startswith("//") else text)
        elif command == "/exit":
            return False
        elif command == "/reset":
            self.reset(self.system)
        elif command == "/system":
            if not self.tokenizer.chat_template:
                raise MiniGPTError(f"/system: {NO_TEMPLATE}")
            self.reset(argument or None)
        elif command == "/save":
            self.save(argument)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise MiniGPTError(f"{command} is not a command; /help lists them, and // starts a message with a slash")
        return True

    def answer(self, text: str) -> None:
        from ..inference.generation import generate
        from .streaming import TextPrinter

        if not self.tokenizer.chat_template:
            with _stoppable() as stopping:
                printer = TextPrinter(self.tokenizer, text)
                generate(self.model, self.tokenizer, text, streamer=printer, extra_options=stopping, **self.options)
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, forgotten = fitting(self.model, self.tokenizer, messages, self.options.get("max_new_tokens", 1))
        if forgotten:
            print(f"({FORGOTTEN.format(forgotten)})", file=sys.stderr)
        with _stoppable() as stopping:
            printer = TextPrinter(self.tokenizer, "")
            (answer,) = generate(
                self.model, self.tokenizer, messages, streamer=printer, extra_options=stopping, **self.options
            )
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def save(self, name: str) -> None:
        if not name:
            raise MiniGPTError("/save requires the name of a file, e.g. /save chats.jsonl")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise MiniGPTError("there is no conversation to save yet")
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        empty = any(not message["content"].strip() for message in self.messages)
        note = "; it cannot be trained on, because a message is empty" if empty else ""
        print(f"appended to {name}{note}", file=sys.stderr)


def fitting(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], new_tokens: int
) -> tuple[list[dict[str, str]], int]:
    """Return messages without the oldest questions and answers that leave no space in the context, and their number."""
    from ..inference.evaluation import longest_context
    from ..inference.generation import encode_prompt

    start, forgotten = int(messages[0]["role"] == "system"), 0
    space = longest_context(model) - new_tokens
    while len(messages) > start + 2 and encode_prompt(tokenizer, messages).input_ids.shape[1] > max(space, 1):
        messages, forgotten = messages[:start] + messages[start + 2 :], forgotten + 1
    return messages, forgotten


@contextmanager
def _stoppable() -> Iterator[Any]:
    """Stop generation at the next token on Ctrl-C. Provides the `extra_options` of `generate`."""
    from .streaming import stopping_when

    stopped = False

    def stop(number: int, frame) -> None:
        nonlocal stopped
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopping_when(lambda: stopped)
    finally:
        signal.signal(signal.SIGINT, before)
