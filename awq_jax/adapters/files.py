"""PEFT's adapter directories: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_jax.convert.config_json import JsonObject
from awq_jax.convert.files.safetensors import read_header, read_json
from awq_jax.convert.files.shards import atomic_directory, write_file, write_json
from awq_jax.convert.files.slices import read_bytes
from awq_jax.dtypes import FLOATS, all_finite
from awq_jax.errors import CheckpointError, FormatError, ShapeError, WeightError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OURS = "awq_jax"  # our key in the config; PEFT warns of it and goes on, vLLM does not look
LAYOUT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What the file may hold that is no pair of factors, and why it is not read.
REFUSED = (
    (re.compile(r"\.lora_embedding_[AB]$"), "an adapter of an embedding: train one of the linears only"),
    (re.compile(r"\.lora_magnitude_vector"), "DoRA's magnitudes, which need the float weights: merge it with PEFT"),
    (re.compile(r"\.lora_[AB]\.bias$"), "a bias of a factor (lora_bias), which has no place here"),
    (re.compile(r"\.lora_[AB]\.\w+\.weight$"), "a factor under the name of an adapter: save it with save_pretrained"),
    (re.compile(r"\.(ia3_l|hada_|lokr_|oft_|vera_|prompt_)"), "another method than LoRA"),
)
# Settings of PEFT that change what is computed, and at which values they do not.
UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_dora", (None, False), "DoRA divides by norms of the float weights; merge it into the float model with PEFT"),
    ("bias", (None, "none"), "trained biases are not read; train with bias='none'"),
    ("lora_bias", (None, False), "biases of factors are not read; train with lora_bias=False"),
    ("layer_replication", (None, []), "replicated layers are another model"),
    ("target_parameters", (None, []), "adapters of bare parameters are not read; name modules in target_modules"),
    ("trainable_token_indices", (None, []), "trained token embeddings are not read"),
    ("use_qalora", (None, False), "QALoRA pools its inputs; train with plain LoRA"),
    ("alora_invocation_tokens", (None, []), "aLoRA switches the adapter on within a text; train with plain LoRA"),
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of one linear: ``y = x W + scale (x A^T) B^T``.

    Attributes:
      a: ``[R, K]``, as PEFT stores it.
      b: ``[N, R]``.
      scale: alpha over rank, or over its root (rsLoRA, arXiv 2312.03732).
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as its files have it.

    Attributes:
      factors: by module: ``model.layers.0.self_attn.q_proj``.
      config: content of ``adapter_config.json``.
      whole: tensors that replace the base's, by name (``modules_to_save``).
      name: where it was read from, for messages.
    """

    factors: Mapping[str, Factors]
    config: JsonObject
    whole: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    name: str = "the adapter"

    @property
    def scales(self) -> str | None:
        """The digest of the folded scales it is for; "" for none: the float model. None: it does not say."""
        ours = self.config.get(OURS)
        found = ours.get("scales") if isinstance(ours, Mapping) else None
        return found if isinstance(found, str) else None

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max((f.rank for f in self.factors.values()), default=0)

    def told(self, base: str, scales: str) -> Adapter:
        """The same, said to be for ``base`` with the folded scales of that digest."""
        from awq_jax._version import __version__

        ours = {"version": __version__, "base": base, "scales": scales}
        return dataclasses.replace(self, config={**self.config, OURS: ours})


def read(directory: str | Path) -> Adapter:
    """An adapter from its directory. Nothing is unpickled: ``adapter_model.bin`` is refused.

    Raises:
      CheckpointError: a file is missing, damaged, or contradicts the other.
      FormatError: it is an adapter that cannot be served here; named, with the remedy.
      WeightError: a factor holds NaN or inf.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}: is it the directory that PEFT's save_pretrained wrote?")
    config = read_json(path / CONFIG)
    _check_config(config, path)
    if not (path / TENSORS).is_file():
        pickled = any(path.glob("adapter_model.bin"))
        remedy = "save it again with safe_serialization=True: pickles are not read" if pickled else "is it complete?"
        raise CheckpointError(f"{path} has no {TENSORS}; {remedy}")
    entries = read_header(path / TENSORS)[0]

    def tensor(name: str) -> np.ndarray:
        e = entries[name]
        return read_bytes(e.file, e.offset, e.nbytes, name).view(e.dtype).reshape(e.shape)

    sides: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name in sorted(entries):
        own = name.removeprefix(PREFIX)
        if own == name:
            raise CheckpointError(
                f"{path / TENSORS} holds {name}; keys begin with {PREFIX}, and PEFT would pass over this one: save the "
                "adapter with PeftModel.save_pretrained"
            )
        if match := LAYOUT.fullmatch(own):
            sides.setdefault(match["module"], {})[match["side"]] = tensor(name)
            continue
        for pattern, why in REFUSED:
            if pattern.search(own):
                raise FormatError(f"{path / TENSORS} holds {name}: {why}")
        if not own.endswith(".base_layer.weight"):  # PEFT writes the frozen embedding beside its adapter
            whole[own] = tensor(name)
    factors = {module: _pair(module, found, config, path) for module, found in sides.items()}
    if not factors:
        raise CheckpointError(f"{path / TENSORS} holds no factors lora_A and lora_B: it would have no effect")
    return Adapter(factors, config, whole, str(directory))


def _check_config(config: JsonObject, path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{path / CONFIG} says peft_type {config.get('peft_type')!r}; only LORA is read")
    for key, harmless, why in UNSUPPORTED:
        if config.get(key) not in harmless:
            raise FormatError(f"{path / CONFIG} says {key}={config[key]!r}: {why}")
    for key in ("r", "lora_alpha"):
        if isinstance(value := config.get(key), bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{path / CONFIG} says {key}={value!r}; it must be a positive number")


def _pair(module: str, found: Mapping[str, np.ndarray], config: JsonObject, path: Path) -> Factors:
    if len(found) < 2:
        raise CheckpointError(f"{path / TENSORS} has lora_{next(iter(found))} of {module}, and not the other factor")
    a, b = found["A"], found["B"]
    rank = pattern(config.get("rank_pattern"), module, config["r"])
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) != rank:
        raise CheckpointError(
            f"{module} has factors of shapes {a.shape} and {b.shape} in {path / TENSORS}, and rank {rank} in {CONFIG}"
        )
    for side, factor in found.items():
        if factor.dtype.name not in FLOATS or not all_finite(factor):
            raise WeightError(f"lora_{side} of {module} in {path} is not of finite floats; train it again")
    alpha = float(pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return Factors(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def pattern(table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of a ``rank_pattern`` or ``alpha_pattern`` for a module: the first whose end of a name it has."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def write(adapter: Adapter, directory: str | Path, overwrite: bool = False) -> None:
    """Write an adapter that PEFT and vLLM read; all of it or nothing.

    Raises:
      CheckpointError: ``directory`` exists, or the disk refuses.
    """
    tensors: dict[str, np.ndarray] = {f"{PREFIX}{name}": value for name, value in adapter.whole.items()}
    for module, f in adapter.factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(f.a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(f.b)
    path = Path(directory).expanduser().absolute()
    if overwrite and (path / CONFIG).is_file():
        shutil.rmtree(path)
    try:
        with atomic_directory(path, overwrite) as work:
            write_json(work / CONFIG, adapter.config)
            write_file(work / TENSORS, tensors, {"format": "pt"})
    except OSError as e:
        raise CheckpointError(f"cannot write {directory}: {e}") from e


def config_of(factors: Mapping[str, Factors], modules: list[str], base: str, rslora: bool = False) -> JsonObject:
    """An ``adapter_config.json`` for these factors.

    Args:
      factors: by module.
      modules: all linears of the model, so that ``target_modules`` names no other.
      base: the base's directory or hub id.
      rslora: scales are alpha over the root of the rank.

    Raises:
      ShapeError: there are no factors.
    """
    if not factors:
        raise ShapeError("an adapter without factors has no effect")

    def root(rank: int) -> float:
        return math.sqrt(rank) if rslora else float(rank)

    ranks = {m: f.rank for m, f in factors.items()}
    alphas = {m: _whole(f.scale * root(f.rank)) for m, f in factors.items()}
    rank, alpha = (max(sorted(set(t.values())), key=list(t.values()).count) for t in (ranks, alphas))
    short = sorted({m.rpartition(".")[2] for m in factors})
    exact = all(m in factors for m in modules if m.rpartition(".")[2] in short)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": short if exact else sorted(factors),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _whole(x: float) -> float:
    return round(x) if abs(x - round(x)) < 1e-6 * max(abs(x), 1) else x
