"""How to run a checkpoint: the part of its model card that names programs and their commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.engines import contents, verdicts
from awq_jax.convert.format import Format, Record
from awq_jax.convert.formats.awq import scaled_activations
from awq_jax.convert.source import Source, path_of

# What engines are called, and called with. Which of them serve a checkpoint `engines` says; ours reads all.
SERVING = {
    "vllm": ("vLLM", "vllm serve MODEL"),
    "transformers": (
        "transformers",
        "from transformers import pipeline\n\n"
        'pipe = pipeline("TASK", model="MODEL", device_map="auto")\nprint(pipe(PROMPT))',
    ),
    "mlx": ("mlx-lm", 'mlx_lm.generate --model MODEL --prompt "Why is the sky blue?"'),
    "llama.cpp": ("llama.cpp", 'llama-cli -m MODEL -p "Why is the sky blue?"  # or: llama-server -m MODEL'),
}
NEEDS = {"awq": "gptqmodel", "gptq": "gptqmodel", "compressed-tensors": "compressed-tensors"}  # by transformers


def served_by(format: Format, config: HfConfig, records: Sequence[Record]) -> list[str]:
    """The engines of `SERVING` that serve a checkpoint as they are called there: of a single file, only llama.cpp."""
    if format.name == "gemm" and scaled_activations.are_in(config):
        return []  # vLLM takes none of their scales, transformers wants them all, and records do not tell
    c = contents.of_records(format.name, config, records)
    found = [engine for engine in SERVING if verdicts.verdict(engine, c).serves]
    return [engine for engine in found if engine == "llama.cpp" or not format.suffix]


def lines_of(
    format: Format, file: str, task: str, config: HfConfig, records: Sequence[Record], chat: bool
) -> list[str]:
    """Lines of Markdown.

    Args:
      format, config, records: of the checkpoint.
      file: its name, if it is a single file.
      task: the card's pipeline tag.
      chat: it has a chat template.
    """
    model = file or "MODEL"
    lines = [] if file else ["`MODEL` is the directory, or the id of its repository."]
    prompt = '[{"role": "user", "content": "Why is the sky blue?"}]' if chat else '"The sky is blue because"'
    for engine in served_by(format, config, records):
        name, command = SERVING[engine]
        needs = NEEDS.get(family(format), "") if engine == "transformers" and any(r.bits for r in records) else ""
        command = command.replace("TASK", task).replace("PROMPT", prompt).replace("MODEL", model)
        lines += ["", f"{name} (`pip install transformers {needs}`):" if needs else f"{name}:", ""]
        lines += [f"```{'python' if engine == 'transformers' else 'sh'}", command, "```"]
    if format.name == "orbax":
        ours, kind = 'params = awq_jax.convert.restore("MODEL")  # leaves that awq_jax.bind takes', "python"
    else:
        ours, kind = f'awq-jax generate {model} "Why is the sky blue?"{" --chat" if chat else ""}', "sh"
    return [*lines, "", "awq_jax:", "", f"```{kind}", ours, "```"]


def family(format: Format) -> str:
    """``awq`` of the formats of AutoAWQ and llm-awq, else the format's name without its version."""
    return "awq" if re.match("AutoAWQ|llm-awq", format.title) else format.name.removesuffix("-v2")


def chats(source: Source | None) -> bool:
    """Whether the source has a chat template."""
    where = None if source is None else path_of(source)
    if where is None:
        return False
    if where.is_file():
        metadata = getattr(getattr(source, "file", None), "metadata", {})
        return "tokenizer.chat_template" in metadata
    config = where / "tokenizer_config.json"
    inside = config.is_file() and b'"chat_template"' in config.read_bytes()
    return inside or (where / "chat_template.jinja").is_file() or (where / "chat_template.json").is_file()
