"""A packed checkpoint's tensors as the family's float checkpoints have them, where that is not linear by linear.

A packed checkpoint has a module for each linear, as PyTorch's: ``[out, in]``, and for each expert its own. Float ones
of most families have the same. Those of GPT-2 turn its linears, and of some mixtures of experts one tensor holds a
layer's: transformers, vLLM and all else that reads them knows only these. (transformers: ``modeling_gpt2.py``,
``modeling_gpt_oss.py``, ``modeling_granitemoe.py``.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.config_json import HfConfig
from awq_jax.convert.files.slices import Tensor
from awq_jax.convert.source import Info, Source, path_of
from awq_jax.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from awq_jax.convert.text import TokenizerLike


@dataclasses.dataclass(frozen=True)
class Stack:
    """A tensor that holds what a packed checkpoint has of every expert of a layer.

    Attributes:
      name: of the tensor, in the module around ``experts``.
      parts: which of an expert's tensors, ``experts.N.PART``, lie side by side, in their order.
      turned: matrices are ``[in, out]``.
      interleaved: outputs of the parts take turns.
    """

    name: str
    parts: tuple[str, ...]
    turned: bool = False
    interleaved: bool = False

    def join(self, experts: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """The tensor ``[E, ...]`` of all parts, ``[out, in]`` or ``[out]``, of all experts."""
        return np.stack([self._one([np.asarray(p) for p in parts]) for parts in experts])

    def shape(self, experts: int, part: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor whose parts have the shape ``part`` each."""
        whole = (part[0] * len(self.parts), *part[1:])
        return (experts, *(whole[::-1] if self.turned else whole))

    def _one(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = np.stack(parts, 1).reshape(-1, *parts[0].shape[1:]) if self.interleaved else np.concatenate(parts)
        return whole.T if self.turned else whole


GRANITE = (
    Stack("input_linear.weight", ("gate_proj.weight", "up_proj.weight")),
    Stack("output_linear.weight", ("down_proj.weight",)),
)
GPT_OSS = (
    Stack("experts.gate_up_proj", ("gate_proj.weight", "up_proj.weight"), True, True),
    Stack("experts.gate_up_proj_bias", ("gate_proj.bias", "up_proj.bias"), False, True),
    Stack("experts.down_proj", ("down_proj.weight",), True),
    Stack("experts.down_proj_bias", ("down_proj.bias",)),
)
# By ``model_type``. Experts: the module around them, and its tensors.
STACKS = {
    "granitemoe": ("block_sparse_moe", GRANITE),
    "granitemoeshared": ("block_sparse_moe", GRANITE),
    "gpt_oss": ("mlp", GPT_OSS),
}
EXPERT = re.compile(r"(?P<around>.+)\.experts\.(?P<e>\d+)\.(?P<part>.+)")
TURNED = {"gpt2": re.compile(r"\.(attn|mlp|crossattention)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")}


@dataclasses.dataclass(frozen=True)
class Whole:
    """A float tensor and what it is made of."""

    name: str
    stack: Stack | None
    place: tuple[int, int] = (0, 0)  # expert and part


class FloatForm:
    """What the float checkpoints of one family call and turn."""

    def __init__(self, config: HfConfig) -> None:
        kind = config.get("model_type")
        kind = kind if isinstance(kind, str) else ""
        self._turned = TURNED.get(kind)
        self._module, self._stacks = STACKS.get(kind, ("", ()))
        count = config.get("num_local_experts")
        self._experts = count if isinstance(count, int) else 0

    def of(self, name: str) -> Whole:
        """The tensor that one of a packed checkpoint belongs to."""
        if self._stacks and (match := EXPERT.fullmatch(name)) and match["around"].endswith(f".{self._module}"):
            for stack in self._stacks:
                if match["part"] in stack.parts:
                    place = int(match["e"]), stack.parts.index(match["part"])
                    return Whole(f"{match['around']}.{stack.name}", stack, place)
        return Whole(name, None)

    def is_turned(self, name: str) -> bool:
        """Whether a packed weight is ``[in, out]`` where it is float."""
        return self._turned is not None and self._turned.search(name) is not None

    def alone(self, name: str, value: Tensor) -> Tensor:
        """A tensor that is one by itself: as it is, or dequantized and turned."""
        if isinstance(value, QuantizedTensor) and self.is_turned(name):
            return np.ascontiguousarray(_float(value).T)
        return value

    def all_of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Named tensors of a packed checkpoint as those of a float one. Memory: the stacks of a layer.

        A layer that does not have all of its experts keeps the names it has.
        """
        waiting: dict[str, dict[tuple[int, int], tuple[str, Tensor]]] = {}
        for name, value in tensors:
            whole = self.of(name)
            if whole.stack is None:
                yield name, self.alone(name, value)
                continue
            parts = waiting.setdefault(whole.name, {})
            parts[whole.place] = name, value
            if len(parts) == self._experts * len(whole.stack.parts):
                rows = [[_float(parts[e, p][1]) for p in range(len(whole.stack.parts))] for e in range(self._experts)]
                del waiting[whole.name], parts
                yield whole.name, whole.stack.join(rows)
        for left in waiting.values():
            yield from left.values()


class FloatFormSource:
    """A `awq_jax.convert.source.Source` of a packed checkpoint with the tensors of a float one.

    Attributes: as of the source that it is made of.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._form = source, FloatForm(source.config)
        self.format, self.config, self.generation_config = source.format, source.config, source.generation_config
        self.directory = path_of(source)
        self.identity = getattr(source, "identity", "")
        self._parts: dict[str, dict[tuple[int, int], str]] = {}
        self._stacks: dict[str, Stack | None] = {}
        for name in source.names():
            whole = self._form.of(name)
            self._parts.setdefault(whole.name, {})[whole.place] = name
            self._stacks[whole.name] = whole.stack

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def info(self, name: str) -> Info:
        parts, stack = self._parts.get(name, {}), self._stacks.get(name)
        infos = [self._source.info(p) for p in parts.values()] or [self._source.info(name)]
        first = infos[0]
        if stack is None:
            turned = first.packed is not None and self._form.is_turned(name)
            return dataclasses.replace(first, shape=first.shape[::-1]) if turned else first
        same = len({i.dtype for i in infos}) == 1
        packed = next((i.packed for i in infos if i.packed), None)
        shape = stack.shape(len(parts) // len(stack.parts), first.shape)
        return Info(shape, first.dtype if same else "float32", sum(i.nbytes for i in infos), packed)

    def read(self, name: str) -> Tensor:
        parts, stack = self._parts.get(name, {}), self._stacks.get(name)
        if stack is None:
            return self._form.alone(name, self._source.read(name))
        experts = len(parts) // len(stack.parts)
        return stack.join(
            [[_float(self._source.read(parts[e, p])) for p in range(len(stack.parts))] for e in range(experts)]
        )

    def tokenizer(self) -> TokenizerLike | None:
        return self._source.tokenizer()

    def companions(self) -> list[Path]:
        return self._source.companions()


def of(source: Source) -> Source:
    """``source`` with the tensors of a float checkpoint of its family."""
    return FloatFormSource(source) if source.config.get("model_type") in {*STACKS, *TURNED} else source


def _float(value: Tensor) -> np.ndarray:
    """A matrix ``[out, in]``, in float32 if it is packed."""
    if not isinstance(value, QuantizedTensor):
        return np.asarray(value)
    return codes.dequantize(linear.as_linear(value)).T
