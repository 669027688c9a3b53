"""``awq-jax generate``: continue a prompt, streaming to the terminal, or a file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq_jax.cli import common, sampling_options
from awq_jax.errors import ConfigError

if TYPE_CHECKING:
    from awq_jax.cli.prompt_file import Prompt
    from awq_jax.serve.answer import Answer
    from awq_jax.serve.model import Model

_EXAMPLES = """
awq-jax generate ./model-awq "Once upon a time" --max-new-tokens 200
awq-jax generate ./model-awq "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
echo "Dear diary," | awq-jax generate ./model-awq - --stop "The end"
awq-jax generate ./model-awq --prompts questions.txt --chat --batch-size 16
awq-jax generate ./model-awq --prompts chats.jsonl --json > answers.jsonl
awq-jax generate ./model-awq "List the tables" --adapter ./sql-lora
awq-jax generate ./model-awq --prompts mixed.jsonl --adapter sql=./sql-lora --adapter chat=./chat-lora
"""


def add(subparsers: common.Commands) -> None:
    """Register the command."""
    p = common.parser(
        subparsers,
        "generate",
        run,
        "continue a prompt, or a file of prompts",
        "Continue a prompt; text appears as it is generated. Greedy unless --temperature is set.\n"
        'Of a file of prompts (a prompt a line; .jsonl: objects with "prompt" or "messages") --batch-size are\n'
        "continued at once. --json prints an object for each prompt: prompt, text, finish_reason (stop, length),\n"
        "prompt_tokens, completion_tokens, tokens_per_second (prefill, decode; without compiling), seed, model.",
        _EXAMPLES,
    )
    p.add_argument("dir", metavar="DIR", help="checkpoint directory, .gguf file or hub id")
    p.add_argument("prompt", metavar="PROMPT", nargs="?", help="text, or - to read it from stdin")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="continue each line, or each object of a .jsonl file")
    p.add_argument("--batch-size", type=common.positive, default=8, metavar="N",
                   help="prompts of a file that are continued at once (default: %(default)s)")  # fmt: skip
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    sampling_options.add(p, 128)
    p.add_argument("--logprobs", type=int, metavar="N",
                   help="with --json: log probabilities of the new tokens, and of the N likeliest there")  # fmt: skip
    p.add_argument("--devices", type=common.devices, metavar="N", help="spread the weights over N devices, or 'all'")
    common.add_adapter(p)
    common.add_dtype(p)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print."""
    # What cannot be done is refused before the weights are read.
    if (args.prompt is None) == (args.prompts is None):
        raise ConfigError("pass either PROMPT or --prompts FILE")
    if args.logprobs is not None and not args.json:
        raise ConfigError("--logprobs needs --json")
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as e:
        raise ConfigError(f"the prompt is not {e.encoding.upper()} text (byte {e.start})") from None
    import jax  # which takes seconds, so not for --help

    from awq_jax import models
    from awq_jax.cli import prompt_file
    from awq_jax.convert import registry
    from awq_jax.serve import generate, model, prompts
    from awq_jax.serve.answer import DEFAULT
    from awq_jax.serve.sampling import Sampling

    settings = sampling_options.settings(args) | {"logprobs": args.logprobs}
    source = registry.open_source(args.dir)
    config, tokenizer = models.config_of(source), source.tokenizer()
    Sampling.from_dict(settings).check(config.vocab_size)
    if args.prompts is not None:
        read = prompt_file.read(args.prompts, tokenizer, config, args.chat)
    else:
        [ids] = prompts.encode(tokenizer, prompt, args.chat)
        generate.check_prompts(config, [ids])
        read = [prompt_file.Prompt({"prompt": prompt}, ids)]
    devices = len(jax.devices()) if args.devices == 0 else args.devices
    loaded = model.load(args.dir, args.dtype, mesh=devices, adapter=common.adapters(args), terms=args.terms)
    for prompt_read in read:
        loaded.adapters_of(prompt_read.given.get("adapter", DEFAULT), 1)
    if args.prompts is not None:
        _file(args, loaded, read, settings)
    else:
        _one(args, loaded, read[0], settings)


def _one(args: argparse.Namespace, loaded: Model, prompt: Prompt, settings: dict[str, Any]) -> None:
    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    start = time.perf_counter()
    stream = None if args.json else show
    [answer] = loaded.answers([prompt.ids], max_new_tokens=args.max_new_tokens, stream=stream, **settings)
    if args.json:
        print(common.to_json(told(args.dir, prompt.given, answer) | {"seconds": time.perf_counter() - start}))
    else:
        print()


def _file(args: argparse.Namespace, loaded: Model, read: list[Prompt], settings: dict[str, Any]) -> None:
    from tqdm.auto import tqdm

    from awq_jax.serve.answer import DEFAULT
    from awq_jax.serve.sampling import SEEDS

    with tqdm(total=len(read), desc="generate", unit="prompt", disable=args.quiet, leave=False) as bar:
        for first in range(0, len(read), args.batch_size):
            batch = read[first : first + args.batch_size]
            # Each has a seed of its own, so that its answer does not depend on the batch size.
            seeds = [(args.seed + first + i) % SEEDS for i in range(len(batch))]
            rows = [prompt.ids for prompt in batch]
            named = [name for p in batch for name in loaded.adapters_of(p.given.get("adapter", DEFAULT), 1)]
            chosen = settings | {"seed": seeds, "adapter": named}
            found = loaded.answers(rows, max_new_tokens=args.max_new_tokens, **chosen)
            for i, (prompt, answer) in enumerate(zip(batch, found, strict=True), first + 1):
                if args.json:
                    text = common.to_json(told(args.dir, prompt.given, answer), indent=None)
                else:
                    text = f"--- {i}: {_start(prompt.given)}\n{answer.text}"
                bar.write(text, file=sys.stdout)
            bar.update(len(batch))


def told(model: str, given: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """What ``--json`` says of one answer."""
    speed = {"prefill": answer.prefill_tokens_per_second, "decode": answer.decode_tokens_per_second}
    found: dict[str, Any] = {
        "model": model,
        **given,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "tokens_per_second": speed,
        "seed": answer.seed,
    }
    if answer.logprobs is not None:
        found["logprobs"] = [
            {"token": t, "logprob": v, "likely": [{"token": i, "logprob": p} for i, p in likely]}
            for t, v, likely in answer.logprobs
        ]
    return found


def _start(given: dict[str, Any], most: int = 70) -> str:
    """The beginning of a prompt, or of the last message of a chat."""
    text = " ".join(str(given["prompt"] if "prompt" in given else given["messages"][-1].get("content", "")).split())
    return text if len(text) <= most else text[:most] + "..."
