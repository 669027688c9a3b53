"""The model card beside a checkpoint: README.md with the hub's front matter, of what is known and nothing else.

A card of ours has a line `MARK` after its front matter, and keeps there what is known of the quantization, so that a
later conversion says it again. Any other README.md of the source is its author's, and is kept as `KEPT`; so is one of
ours that was edited, which the digest in that line tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from awq_jax._version import __version__
from awq_jax.convert import card_usage, folded_scales, registry
from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.files.safetensors import refuse_outside
from awq_jax.convert.files.shards import write_text
from awq_jax.convert.format import Destination, Format, Record, quant_method
from awq_jax.convert.source import Source, path_of
from awq_jax.errors import CheckpointError
from awq_jax.report import Report, geometric, number, size

README = "README.md"
KEPT = "README.source.md"
MARK = re.compile(r"^<!-- written by awq_jax (?P<digest>[0-9a-f]{16}) -->\n", re.MULTILINE)
LIMIT = 1 << 20  # bytes of a README that are looked at
CARRIED = ("license", "license_name", "license_link", "language")  # from the source's own card
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")  # a repository in the hub's cache
LICENSE = ("license", "license.name", "license.link")  # of GGUF's metadata


def of_report(report: Report) -> dict[str, Any]:
    """What a card says of a quantization of ours; plain data.

    Returns:
      ``method``; ``calibration``: the text and its size, without how it begins or in which folder it lay;
      ``error_rounded``, ``error``: typical relative squared output errors over the calibration tokens, if measured.
    """
    facts: dict[str, Any] = {"method": report.config.get("method")}
    if report.calibration:
        text = report.calibration.partition(";")[0]
        facts["calibration"] = re.sub(r"^[/~.][^:]*/", "", text)
    errors = [geometric(getattr(r, name) for r in report.layers) for name in ("error_rtn", "error")]
    if None not in errors:
        facts |= dict(zip(("error_rounded", "error"), map(number, errors), strict=True))
    return facts


def write(
    directory: Path, format: str, destination: Destination, records: Sequence[Record], source: Source | None
) -> None:
    """Put the card into a directory that is being made, and the source's own README.md as `KEPT`."""
    _keep(directory, source)
    text = render(registry.get(format), destination, records, source, (directory / KEPT).is_file())
    write_text(directory / README, text)


def write_beside(path: Path, format: str, destination: Destination, records: Sequence[Record], source: Source) -> None:
    """The card of a single file, in its folder: only where that holds nothing else, and so is the model's own."""
    others = [p for p in path.parent.iterdir() if p != path and not p.name.startswith(".")]
    beside = (README, KEPT, folded_scales.place(path).name)
    if any(p.name not in beside for p in others) or not _may_replace(path.parent / README):
        return
    _keep(path.parent, source)
    text = render(registry.get(format), destination, records, source, (path.parent / KEPT).is_file(), path.name)
    write_text(path.parent / README, text)


def is_of(readme: Path, file: str) -> bool:
    """Whether a README.md is a card of ours of that file."""
    return readme.is_file() and MARK.search(text_of(readme)) is not None and file in text_of(readme)


def _may_replace(readme: Path) -> bool:
    return not os.path.lexists(readme) or untouched(text_of(readme))


def _keep(directory: Path, source: Source | None) -> None:
    where = _readme_of(source)
    if where is None or where.parent == directory:
        return
    if untouched(text_of(where)):  # ours: what it says is said again, and what it was made from stays beside it
        where = where.parent / KEPT
    with contextlib.suppress(CheckpointError):  # a link to elsewhere is none of the checkpoint's files
        refuse_outside(where, where.parent)
        if where.is_file():
            shutil.copyfile(where, directory / KEPT)


def _readme_of(source: Source | None) -> Path | None:
    """README.md beside the source's weights; what lies beside a single file need not be about it, unless it is ours."""
    where = None if source is None else path_of(source)
    if where is None:
        return None
    found = (where if where.is_dir() else where.parent) / README
    try:
        refuse_outside(found, found.parent)
    except CheckpointError:
        return None
    return found if found.is_file() and (where.is_dir() or MARK.search(text_of(found))) else None


def text_of(path: Path) -> str:
    """A README, at most `LIMIT` bytes of it."""
    with path.open("rb") as f:
        return f.read(LIMIT).decode("utf-8", "replace")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def untouched(text: str) -> bool:
    """Whether a card is as we wrote it."""
    mark = MARK.search(text)
    return mark is not None and _digest(MARK.sub("", text, count=1)) == mark["digest"]


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the beginning of a README, as plain data; empty if there is none or it is broken."""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the weights come from, as far as it is known.

    Attributes:
      name: of the model, for people.
      base_model: its repository on the hub, or "".
      revision: commit of that repository, or "".
      card: carried over from its own card: license, language.
      pipeline_tag: of its card, or "".
      facts: of an earlier card of ours, see `of_report`.
    """

    name: str
    base_model: str = ""
    revision: str = ""
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pipeline_tag: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def origin_of(source: Source | None) -> Origin:
    """What a source's place, its card or its GGUF metadata say."""
    where = None if source is None else path_of(source)
    if source is None or where is None:
        return Origin("a model")
    readme = _readme_of(source)
    text = text_of(readme) if readme is not None else ""
    head, ours = front_matter(text), MARK.search(text) is not None
    metadata = getattr(getattr(source, "file", None), "metadata", None)
    if not ours and isinstance(metadata, Mapping):
        said = {key.replace(".", "_"): metadata.get(f"general.{key}") for key in LICENSE}
        head = {key: text for key, text in said.items() if text} | head
        if match := REPOSITORY.fullmatch(str(metadata.get("general.source.huggingface.repository"))):
            head.setdefault("source", match[0])
    where = Path(os.path.abspath(where))
    name, base, revision = " ".join((where.stem if where.is_file() else where.name).split()), "", ""
    folder = where.parent if where.is_file() else where
    repository = SNAPSHOT.fullmatch(folder.parents[1].name) if folder.parent.name == "snapshots" else None
    if repository is not None:
        base, revision, name = f"{repository['owner']}/{repository['name']}", folder.name, repository["name"]
    packed = source.format not in ("float", "gguf")
    stated = head.get("base_model")
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    if ours or (packed and isinstance(stated, str)):  # it is another form of the same weights
        revision = str(_quantization(head).get("revision") or "") if ours and stated else revision
        base = str(stated or base)
    if not base and isinstance(head.get("source"), str):
        base = head["source"]
    if ours:
        name = _quantization(head).get("model") or name
    card = {k: v for k in CARRIED if (v := _texts(head.get(k)))}
    tag = head.get("pipeline_tag")
    facts = _quantization(head) if ours else {}
    return Origin(name, base, revision, card, tag if isinstance(tag, str) else "", facts)


def _texts(value: object) -> str | list[str]:
    """A text or texts; "" for anything else that YAML may hold, as False for the language ``no``."""
    if isinstance(value, list):
        return [v for v in value if isinstance(v, str)]
    return value if isinstance(value, str) else ""


def _quantization(head: Mapping[str, Any]) -> dict[str, Any]:
    found = head.get("quantization")
    return {k: v for k, v in found.items() if isinstance(v, str | int | float)} if isinstance(found, dict) else {}


def render(
    format: Format,
    destination: Destination,
    records: Sequence[Record],
    source: Source | None,
    kept: bool = False,
    file: str = "",
) -> str:
    """The text of a card.

    Args:
      format: of the checkpoint.
      destination: what it was made with.
      records: its tensors.
      source: where they come from.
      kept: the source's own card lies beside it as `KEPT`.
      file: name of the checkpoint, if it is a single file.
    """
    origin = origin_of(source)
    packed = [r for r in records if r.bits]
    facts: dict[str, Any] = {"model": origin.name}
    if destination.settings is None:
        facts |= {**_method_of(source), **origin.facts}
        if any(r.deviation for r in records):  # other weights than those that were measured
            facts.pop("perplexity", None)
    else:  # quantized just now
        facts |= {"method": destination.settings.method, **destination.made}
    if origin.revision:
        facts["revision"] = origin.revision
    facts.pop("bits", None), facts.pop("group_size", None)
    if packed:
        facts |= {"bits": _several(r.bits for r in packed), "group_size": _several(r.group_size for r in packed)}
    quantized = bool(packed) or bool(facts.get("method"))
    head = _head(format, origin, quantized, _tags(format, packed, facts), destination.config)
    head["quantization"] = facts
    lines = ["", f"# {_title(origin.name, packed, format, quantized)}", ""]
    lines += table(_rows(format, origin, packed, records, facts, source))
    lines += [
        "",
        "## How to run it",
        "",
        *card_usage.lines_of(format, file, head["pipeline_tag"], destination.config, records, card_usage.chats(source)),
        "",
    ]
    if origin.base_model:
        lines.append(f"Made from [{origin.base_model}](https://huggingface.co/{origin.base_model}).")
    if kept:
        lines.append(f"The card of what it was made from is [{KEPT}]({KEPT}).")
    return marked(head, "\n".join(lines).rstrip() + "\n")


def marked(head: Mapping[str, Any], rest: str) -> str:
    """A card of this front matter and what follows it, with `MARK` between them."""
    top = f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=1000)}---\n"
    return f"{top}<!-- written by awq_jax {_digest(top + rest)} -->\n{rest}"


def mark_of(text: str) -> re.Match[str]:
    """`MARK` in a card of ours."""
    match = MARK.search(text)
    assert match is not None, "not a card of ours"
    return match


def _method_of(source: Source | None) -> dict[str, Any]:
    """How the weights were quantized, by the source's config."""
    if source is None:
        return {}
    if source.format == "gguf":
        return {"method": "gguf"}
    method = quant_method(source.config)
    return {} if not method or method == "awq-jax" else {"method": method}


def _several(values: Any) -> int | str:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else ", ".join(map(str, found))


def _tags(format: Format, packed: Sequence[Record], facts: Mapping[str, Any]) -> list[str]:
    family = format.name.partition("-q")[0] if format.name.startswith("gguf") else card_usage.family(format)
    bits = [f"{b}-bit" for b in sorted({r.bits for r in packed})]
    method = ["awq"] if "awq" in str(facts.get("method")) and packed else []
    return list(dict.fromkeys([*([family] if packed else []), *method, *bits, "awq_jax"]))


def _head(format: Format, origin: Origin, quantized: bool, tags: list[str], config: HfConfig) -> dict[str, Any]:
    library = next((p for p in ("transformers", "mlx-lm", "llama.cpp") if p in format.title), "")
    library = {"mlx-lm": "mlx", "llama.cpp": "gguf", "": "awq_jax"}.get(library, library)
    images = any(isinstance(v, Mapping) for k, v in config.items() if k == "vision_config")
    head: dict[str, Any] = {}
    if origin.base_model:
        head["base_model"] = origin.base_model
        if quantized:
            head["base_model_relation"] = "quantized"
    head |= origin.card
    head["library_name"] = library
    head["pipeline_tag"] = origin.pipeline_tag or ("image-text-to-text" if images else "text-generation")
    head["tags"] = tags
    return head


def _title(name: str, packed: Sequence[Record], format: Format, quantized: bool) -> str:
    bits = _several(r.bits for r in packed) if packed else ""
    kind = f"{bits} bits" if packed else "dequantized" if quantized else "float"
    return f"{name}, {kind}, {format.name}"


def _rows(
    format: Format,
    origin: Origin,
    packed: Sequence[Record],
    records: Sequence[Record],
    facts: Mapping[str, Any],
    source: Source | None,
) -> list[tuple[str, str]]:
    rows = [("format", f"`{format.name}`: {format.title}")]
    if facts.get("method"):
        rows.append(("method", str(facts["method"])))
    if packed:
        zero = {r.symmetric for r in packed}
        kind = "symmetric" if zero == {True} else "asymmetric" if zero == {False} else "partly symmetric"
        groups = "whole columns" if facts["group_size"] == -1 else f"groups of {facts['group_size']}"
        rows.append(("bits", f"{facts['bits']}, {groups}, {kind}; {len(packed)} of {len(records)} tensors"))
    rows.append(("size", size(sum(r.nbytes for r in records))))
    if facts.get("calibration"):
        rows.append(("calibrated on", str(facts["calibration"])))
    if facts.get("error"):
        told = f"{facts['error']} as stored, {facts['error_rounded']} rounded to nearest"
        rows.append(("output error", f"{told} (squared, relative, typical of a weight, over the calibration tokens)"))
    if facts.get("perplexity"):
        rows.append(("perplexity", str(facts["perplexity"])))
    moved = max((r.deviation for r in records if r.bits), default=0.0)
    if source is not None and source.format != "float" and source.format != format.name:
        moves = f"; weights moved by at most {moved:.2g} of a step" if moved else ""
        rows.append(("source", f"`{source.format}`{moves}"))
    if facts.get("revision"):
        rows.append(("source commit", f"`{facts['revision']}`"))
    return [*rows, ("made with", f"awq_jax {__version__}")]


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of Markdown: an empty head, and a line for each row."""
    cells = [tuple(c.replace("|", "\\|").replace("\n", " ") for c in row) for row in rows]
    return ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)]
