"""Hugging Face tensor names <-> paths in the reference decoder's state, as data."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Rule:
    """One pattern of names. Fields in braces stand for digits (``{i}``) or a word (any other).

    Attributes:
      name: Hugging Face tensor name.
      path: parameter path (see `awq_jax.paths`).
      transpose: a PyTorch ``[out, in]`` weight against our ``[in, out]`` kernel.
    """

    name: str
    path: str
    transpose: bool = False


RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
    Rule("model.layers.{i}.{block}.{proj}_proj.weight", "layers/{i}/{block}/{proj}_proj/kernel", transpose=True),
    Rule("model.layers.{i}.{block}.{proj}_proj.bias", "layers/{i}/{block}/{proj}_proj/bias"),
    Rule("model.layers.{i}.self_attn.{norm}_norm.weight", "layers/{i}/self_attn/{norm}_norm/scale"),
    Rule("model.layers.{i}.{norm}_layernorm.weight", "layers/{i}/{norm}_layernorm/scale"),
    Rule("model.norm.weight", "norm/scale"),
    Rule("lm_head.weight", "lm_head/kernel", transpose=True),
)

# Buffers that old checkpoints store and every reader recomputes.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def to_path(name: str) -> tuple[str, bool] | None:
    """``(path, transpose)`` of a Hugging Face tensor, or None if no rule matches."""
    return _translate(name, [(r.name, r.path, r.transpose) for r in RULES])


def to_name(path: str) -> tuple[str, bool] | None:
    """``(name, transpose)`` of a parameter path, or None if no rule matches."""
    return _translate(path, [(r.path, r.name, r.transpose) for r in RULES])


def _translate(text: str, table: list[tuple[str, str, bool]]) -> tuple[str, bool] | None:
    for source, target, transpose in table:
        match = re.fullmatch(_pattern(source), text)
        if match:
            return target.format(**match.groupdict()), transpose
    return None


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template)  # literal, field, literal, field, ...
    out = [re.escape(p) if k % 2 == 0 else f"(?P<{p}>{_field(p)})" for k, p in enumerate(parts)]
    return "".join(out)


def _field(name: str) -> str:
    return r"\d+" if name == "i" else r"\w+?"
