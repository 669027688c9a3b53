"""What an engine says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from awq_jax.serve.engine import slots
from awq_jax.serve.engine.programs import Programs

if TYPE_CHECKING:
    from awq_jax.serve.model import Model


def explain(model: Model, programs: Programs, reuse: bool) -> str:
    """Weights, cache and sizes, one fact a line."""
    s, config = programs.sizes, programs.config
    kept = "keys and values in 8 bits" if programs.kv_bits else "keys and values as the model makes them"
    lines = [
        model.explain(),
        f"{s.slots} slots of {s.length} tokens, {slots.nbytes(programs.shapes) / 1e6:,.1f} MB: {kept}",
        f"prompts are read {min(s.chunk, s.chunks[-1])} tokens at a time between steps of the others",
        f"{programs.compiled} programs: steps of {_list(s.rows)} slots that read {_list(s.reads)} tokens",
    ]
    if programs.adapters:
        lines.append(f"adapters that requests choose: {', '.join(programs.adapters)}; each step multiplies by all")
    if any(not slots.is_store(layer) for layer in programs.shapes.layers):
        lines.append("some layers keep a state that cannot be shared: every prompt is read from its beginning")
    elif reuse:
        lines.append("prompts that begin alike are read once, as long as a slot holds what they share")
    if any(layer.window is not None for layer in config.layers):
        lines.append("layers with a sliding window keep all tokens of a slot, so they save no memory")
    if len(s.chunks) > 1 and s.chunks[-1] > s.chunk:
        lines.append("a prompt beyond the original context is read as a whole: its angles depend on its length")
    return "\n".join(lines)


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
