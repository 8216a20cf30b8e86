"""``spotjax generate`` and ``spotjax chat``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spotjax.commands.arguments import add_client_flags, add_command, client_of
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from spotjax.api.requests import Prompt, Sampling
    from spotjax.client import SpotjaxClient
    from spotjax.commands.arguments import Commands
    from spotjax.engine.generation import Delta

CHAT_TOKENS = 256

GENERATE_EXAMPLES = """\
  spotjax generate "Once upon a time" --max-tokens 64 --temperature 0
  spotjax generate "To be" --seed 1 --top-p 0.9 --stop ". " -n 3
  echo "Once upon a time" | spotjax generate - --json
  spotjax generate "Born on " --regex "[0-9]{4}-[0-9]{2}-[0-9]{2}"
"""
CHAT_EXAMPLES = """\
  spotjax chat                                      a conversation; Ctrl-D ends it
  spotjax chat "What is a spot instance?"           one question
"""


def add_commands(commands: Commands) -> None:
    """Adds both commands."""
    generate = add_command(commands, "generate", run_generate, "go on from a text", GENERATE_EXAMPLES)
    generate.add_argument("text", metavar="TEXT", help="text to go on from; - reads standard input")
    generate.add_argument("-n", type=int, default=1, metavar="COUNT", help="choices, 1 to 16 (default: 1)")
    generate.add_argument("--request-id", metavar="ID", help="name of the request, for resuming (default: random)")
    chat = add_command(commands, "chat", run_chat, "have a conversation", CHAT_EXAMPLES)
    chat.add_argument("message", metavar="MESSAGE", nargs="?", help="ask just this; without it, messages are read")
    chat.add_argument("--system", metavar="TEXT", help="instructions that the conversation begins with")
    for parser in (generate, chat):
        add_client_flags(parser)
        add_request_flags(parser)
        add_sampling_flags(parser)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags for what a request has besides prompt and sampling."""
    parser.add_argument("--model", metavar="NAME", help="model that must be the one that is served")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up and cancel after this time")
    parser.add_argument(
        "--resumable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on when the connection or the server breaks, and connect again (default: on)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help="wait so long for a server that went away or is starting; 0 gives up at once (default: 120)",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of the message ``Sampling``; one that is not given leaves its field unset."""
    group = parser.add_argument_group("sampling")

    def add(name: str, help: str, **options: Any) -> None:
        group.add_argument(name, help=help, default=argparse.SUPPRESS, **options)

    chat = f"; chat: {CHAT_TOKENS}, at most half of what fits" if parser.prog.endswith("chat") else ""
    add("--max-tokens", f"new tokens at most (default: 16{chat})", type=int, metavar="COUNT")
    add("--temperature", "0 always takes the most likely token, to 100 (default: 1)", type=float, metavar="T")
    add("--top-k", "keep only so many most likely tokens; 0 keeps all (default: 0)", type=int, metavar="COUNT")
    add("--top-p", "keep the most likely tokens of this total probability, to 1 (default: 1)", type=float, metavar="P")
    add("--min-p", "drop tokens less likely than this share of the likeliest (default: 0)", type=float, metavar="P")
    add("--seed", "the same seed gives the same text (default: random)", type=int, metavar="NUMBER")
    add("--repetition-penalty", "in (0, 10], above 1 avoids repetition (default: 1)", type=float, metavar="X")
    add("--presence-penalty", "in [-2, 2], above 0 avoids tokens of the output (default: 0)", type=float, metavar="X")
    add("--frequency-penalty", "in [-2, 2], the same times their count (default: 0)", type=float, metavar="X")
    add(
        "--logit-bias",
        "add BIAS, in [-100, 100], to a token; may repeat",
        type=bias,
        action="append",
        metavar="ID=BIAS",
    )
    add("--logprobs", "report so many most likely tokens, 0 to 20; needs --json", type=int, metavar="COUNT")
    add("--stop", "text that ends generation; may repeat", action="append", metavar="TEXT")
    add("--stop-token-ids", "token that ends generation; may repeat", type=int, action="append", metavar="ID")
    add("--ignore-eos", "do not end at the model's end tokens", action="store_true")
    add_structure_flags(parser.add_argument_group("structure of the output, one of"))


def add_structure_flags(group: argparse._ArgumentGroup) -> None:
    """Adds a flag for everything that the message ``Structure`` may be."""
    one = group.add_mutually_exclusive_group()

    def add(name: str, help: str, **options: Any) -> None:
        one.add_argument(name, dest="structure", default=argparse.SUPPRESS, help=help, **options)

    add(
        "--json-schema",
        "JSON that the schema in FILE describes",
        type=partial(content_as, "json_schema"),
        metavar="FILE",
    )
    add("--json-object", "any JSON object", action="store_const", const={"json_object": True})
    add("--regex", "text that all of PATTERN matches", type=lambda pattern: {"regex": pattern}, metavar="PATTERN")
    add("--grammar", "text of the grammar in FILE, in Lark syntax", type=partial(content_as, "grammar"), metavar="FILE")


def content_as(kind: str, path: str) -> dict[str, str]:
    """The structure of that kind whose text is in a file."""
    try:
        return {kind: Path(path).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as problem:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {problem}") from problem


def bias(text: str) -> tuple[int, float]:
    """Reads ``ID=BIAS``."""
    token, _, value = text.partition("=")
    return int(token), float(value)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling fields that were given.

    Raises:
      ConfigError: ``--logprobs`` without ``--json``.
    """
    from spotjax.api.requests import Sampling

    given = {name: getattr(arguments, name) for name in Sampling.__annotations__ if hasattr(arguments, name)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if "logprobs" in given and not arguments.json:
        raise ConfigError("--logprobs needs --json: text output has no place for them")
    return cast(Sampling, given)


def run_generate(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax generate``."""
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with notices(), client_of(arguments) as client, stream(client, text, arguments, arguments.n) as deltas:
        show(deltas, arguments)
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax chat``."""
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with notices(), client_of(arguments) as client:
        if not hasattr(arguments, "max_tokens"):
            arguments.max_tokens = min(CHAT_TOKENS, client.models()[0].max_model_len // 2)
        for question in [arguments.message] if arguments.message is not None else questions():
            messages.append({"role": "user", "content": question})
            with stream(client, messages, arguments, 1) as deltas:
                messages.append({"role": "assistant", "content": show(deltas, arguments)})
    return 0


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Says on standard error, terminal or not, when the client waits for the server and when it goes on."""
    log = logging.getLogger("spotjax.client")
    handler = logging.StreamHandler()
    unfinished = "\n" if sys.stdout.isatty() else ""  # the line that the output is in
    handler.setFormatter(logging.Formatter(f"{unfinished}spotjax: %(message)s"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def questions() -> Iterator[str]:
    """Lines that the user types, or that come through a pipe; empty ones are skipped."""
    with contextlib.suppress(EOFError):
        while True:
            if line := input("> " if sys.stdin.isatty() else "").strip():
                yield line


def stream(
    client: SpotjaxClient, prompt: Prompt, arguments: argparse.Namespace, n: int
) -> contextlib.closing[Generator[Delta, None, None]]:
    """The output for a prompt; leaving the context early cancels the request."""
    return contextlib.closing(
        client.generate(
            prompt,
            n=n,
            request_id=getattr(arguments, "request_id", None),
            model=arguments.model,
            resumable=arguments.resumable,
            timeout=arguments.timeout,
            **sampling_of(arguments),
        )
    )


def show(deltas: Iterator[Delta], arguments: argparse.Namespace) -> str:
    """Prints output as it comes. Several choices would mix, so each is printed when it is complete.

    Returns: the text of the first choice.
    """
    from spotjax.commands.output import print_json

    several = getattr(arguments, "n", 1) > 1
    texts: dict[int, str] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        if arguments.json:
            print_json(delta)
        elif not several:
            print(delta.text, end="\n" if delta.finish else "", flush=True)
        elif delta.finish:
            print(f"--- choice {delta.choice}\n{texts[delta.choice]}", flush=True)
        if delta.finish in ("cancelled", "deadline", "error"):
            print(f"spotjax: the request ended early: {delta.finish}", file=sys.stderr)
    return texts.get(0, "")
