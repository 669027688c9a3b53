"""``awq-jax chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from awq_jax.cli import common, sampling_options
from awq_jax.errors import AwqError, ConfigError

if TYPE_CHECKING:
    from awq_jax.models.config import ModelConfig
    from awq_jax.serve.model import Model

_EXAMPLES = """
awq-jax chat ./model-awq
awq-jax chat ./model-awq --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
echo "Why is the sky blue?" | awq-jax chat ./model-awq --json
"""
_HELP = """\
/reset        begin a new conversation
/system TEXT  begin a new one with this system message; without TEXT, with none
/exit         leave (so does the end of the input)
Ctrl-C stops an answer. A line that begins with a space is sent as it is."""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "chat",
        run,
        "talk with a model that has a chat template",
        "A conversation: each line is a message, and answers appear as they are generated. Greedy unless\n"
        "--temperature is set. Lines may also be piped in. --json prints an object for each answer, a line each.\n\n"
        f"{_HELP}",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("--system", metavar="TEXT", help="the system message")
    sampling_options.add(p, 1024)
    p.add_argument("--devices", type=common.devices, metavar="N", help="spread the weights over N devices, or 'all'")
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, then answer line by line."""
    import jax  # which takes seconds, so not for --help

    from awq_jax import models
    from awq_jax.convert import registry
    from awq_jax.serve import model, prompts
    from awq_jax.serve.sampling import Sampling

    # What cannot be done is refused before the weights are read.
    settings = sampling_options.settings(args)
    source = registry.open_source(args.dir)
    config, tokenizer = models.config_of(source), source.tokenizer()
    Sampling.from_dict(settings).check(config.vocab_size)
    if not prompts.needed(tokenizer).chat_template:
        raise ConfigError(
            f"{args.dir} has no chat template, as models have that were not trained to chat: use awq-jax generate, or "
            "put the model's chat_template.jinja beside its tokenizer.json"
        )
    prompts.encode(tokenizer, [*_system(args.system), {"role": "user", "content": "Hello"}], chat=True)
    loaded = model.load(args.dir, args.dtype, mesh=len(jax.devices()) if args.devices == 0 else args.devices)
    talk = Conversation(loaded, config, args, settings)
    by_hand = sys.stdin.isatty()
    common.say(f"{loaded!r}\n{_HELP}", args.quiet or not by_hand)
    for line in _typed() if by_hand else _piped():
        if not line.strip():
            continue
        if not line.startswith("/"):
            talk.answer(line.strip())
        elif not talk.obey(*line.strip().partition(" ")[::2]):
            break


class Conversation:
    """What was said, and what the model keeps of it.

    Args:
      loaded, config: the model.
      args: of the command line.
      settings: of sampling.
    """

    def __init__(self, loaded: Model, config: ModelConfig, args: argparse.Namespace, settings: dict[str, Any]):
        self.loaded, self.config, self.args, self.settings = loaded, config, args, settings
        self.begin(args.system)

    def begin(self, system: str | None) -> None:
        """A new conversation."""
        from awq_jax.serve.generate import Past

        self.system, self.messages, self.past = system, _system(system), Past()

    def obey(self, command: str, text: str) -> bool:
        """Do what a line says that begins with a slash; False: leave."""
        if command == "/exit":
            return False
        if command == "/reset":
            self.begin(self.system)
        elif command == "/system":
            self.begin(text.strip() or None)
        elif command == "/help":
            common.say(_HELP)
        else:
            common.say(f"no such command: {command}; there are /reset, /system, /exit and /help")
        return True

    def answer(self, message: str) -> None:
        """Answer a message, which is forgotten if it cannot be answered."""
        from awq_jax.serve import generate, prompts
        from awq_jax.serve.sampling import SEEDS

        said: list[str] = []
        self.messages.append({"role": "user", "content": message})
        try:
            [ids] = prompts.encode(self.loaded.tokenizer, self.messages, chat=True)
            generate.check_prompt(self.config, ids, "the conversation")
            [found] = self.loaded.answers(
                [ids], max_new_tokens=self.args.max_new_tokens, stream=self._show(said), past=self.past, **self.settings
            )
        except KeyboardInterrupt:
            self._show([])("\n")
            common.say("(stopped)")
        except AwqError as e:
            self.messages.pop()
            common.say(f"{common.error(e)}; /reset begins a new conversation")
            return
        else:
            said = [found.text]
            self._end(message, found)
            self.settings["seed"] = (self.settings["seed"] + 1) % SEEDS
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()

    def _show(self, said: list[str]) -> Callable[[str], None]:
        def show(piece: str) -> None:
            said.append(piece)
            if not self.args.json:
                print(piece, end="", flush=True)

        return show

    def _end(self, message: str, found: Any) -> None:
        from awq_jax.cli.generate import told

        if self.args.json:
            print(common.to_json(told(self.args.dir, {"prompt": message}, found), indent=None), flush=True)
            return
        print(flush=True)
        if found.finish_reason == "length":
            common.say(
                f"(ends after {found.completion_tokens} tokens; --max-new-tokens sets the limit)", self.args.quiet
            )


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _typed() -> Iterator[str]:
    """Lines from a terminal, with a prompt; Ctrl-C gives a line up."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/exit leaves)", file=sys.stderr)
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise ConfigError(f"the input is not {e.encoding.upper()} text (byte {e.start})") from None
