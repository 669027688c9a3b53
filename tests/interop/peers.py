"""Running the other programs: each in its own environment, as a process that knows nothing of awq_jax."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import awq_jax
from awq_jax.serve.sampling import Sampling

ENVIRONMENTS = "AWQ_JAX_INTEROP_ENVS"
DRIVERS = Path(__file__).with_name("drivers")
NEW_TOKENS = 12
STEPS = 80  # of training
TIMEOUT = 3600  # seconds; the first use of GPTQModel compiles its kernels


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program makes of a checkpoint.

    Attributes:
      logits: float32 ``[T, V]``.
      greedy: the ids it continues with.
      modules: class of each linear, by name, where the program says.
    """

    logits: np.ndarray
    greedy: list[int]
    modules: dict[str, str] = dataclasses.field(default_factory=dict)


def environment(name: str) -> Path:
    """The environment's directory; skips the test where there is none."""
    root = os.environ.get(ENVIRONMENTS)
    if not root:
        pytest.skip(f"set {ENVIRONMENTS} to a directory made by tests/interop/make_envs.sh")
    path = Path(root) / name
    if not (path / "complete").exists():
        pytest.skip(f"no environment there: run tests/interop/make_envs.sh {root} {name}")
    return path


def drive(name: str, driver: str, *arguments: object) -> None:
    """Run a driver in an environment; fails with the end of what it printed."""
    done = try_to_drive(name, driver, *arguments)
    if done.returncode:
        pytest.fail(f"{driver} in {name}: {(done.stdout + done.stderr)[-3000:]}", pytrace=False)


def try_to_drive(name: str, driver: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `drive`, for a driver that may die."""
    command = [environment(name) / "bin/python", DRIVERS / driver, *map(str, arguments)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{environment(name) / 'bin'}{os.pathsep}{keep.get('PATH', '')}"  # for the ninja of GPTQModel's build
    return subprocess.run(
        list(map(str, command)), env=keep | quiet | {"PATH": path}, capture_output=True, text=True, timeout=TIMEOUT
    )


def has_amx() -> bool:
    """Whether vLLM's kernels for 4 bits run on this processor."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_tile" in info.read_text()


def read(name: str, driver: str, checkpoint: Path, ids: np.ndarray, out: Path) -> Reading:
    """A program's reading of a checkpoint; ``ids`` are integers ``[T]``, ``out`` an empty directory to make."""
    out.mkdir()
    np.save(out / "ids.npy", ids)
    drive(name, driver, checkpoint, out / "ids.npy", out, NEW_TOKENS)
    modules = out / "modules.json"
    kinds = json.loads(modules.read_text()) if modules.exists() else {}
    return Reading(np.load(out / "logits.npy"), np.load(out / "greedy.npy").tolist(), kinds)


def ours(checkpoint: Path, ids: np.ndarray) -> Reading:
    """As `read`, by awq_jax in float32."""
    model = awq_jax.load(checkpoint, dtype="float32")
    new = model.generator.run(model.params, [ids.tolist()], max_new_tokens=NEW_TOKENS, sampling=Sampling())
    return Reading(np.asarray(model(ids[None]))[0], new[0])


def distance(a: Reading, b: Reading) -> float:
    """Largest difference of the logits, relative to the largest of ``b``."""
    assert a.logits.shape == b.logits.shape
    return float(np.abs(a.logits - b.logits).max() / np.abs(b.logits).max())


@functools.cache
def text() -> np.ndarray:
    """Token ids ``[T]`` of some English that every Python has."""
    return np.array(tokenizer()(topics["numbers"])["input_ids"])


def prompt(start: int = 300, length: int = 24) -> np.ndarray:
    """Token ids ``[T]`` of a piece of the text that the model has learned."""
    return text()[start : start + length]


def float_checkpoint(directory: Path, model_name: str) -> Path:
    """A small model with heads of a real size, its norms and biases all different, and a tokenizer.

    It learns a text by heart: a greedy continuation of random weights would hang by ties.

    Args:
      directory: to make.
      model_name: a transformers model type, with ``-tied`` if its head is to be its embedding.
    """
    torch.manual_seed(1)
    family, _, tied = model_name.partition("-")
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.04,
        rms_norm_eps=1e-5,
        tie_word_embeddings=bool(tied),
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(0.2 * torch.randn_like(p) + ("norm" in name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.from_numpy(text())
    for _ in range(STEPS):
        starts = torch.randint(0, len(tokens) - 64, (4,))
        batch = torch.stack([tokens[i : i + 64] for i in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path, more: int = 0) -> None:
    """The tokenizer's files, with so many more tokens that no text has."""
    fast = tokenizer() if not more else copy.deepcopy(tokenizer())
    fast.add_tokens([f"<unused{i}>" for i in range(more)])
    fast.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    # transformers 4, which llama.cpp's converter uses, does not know the name that transformers 5 writes.
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama-2's: pieces with byte fallback. 288 pieces: fewer than the model has rows, as usual."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = ["▁", *"etaoinsrhldcumfpgwybvkx,."]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    pieces = [*special, *bytes_, *letters, *("".join(m) for m in merges)]
    model = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    raw = Tokenizer(model)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
