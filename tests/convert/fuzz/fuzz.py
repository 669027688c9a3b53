"""Mutated checkpoints through every reader: refused with a typed error, or read right, and nothing else.

Run by itself for more cases, with a table of what came of them: ``python tests/convert/fuzz/fuzz.py --cases 10000``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_mutations
import ml_dtypes
import numpy as np
from fuzz_mutations import Files, Link
from fuzz_reference import reference

from awq_jax.convert import conversion, registry
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.writing import write_checkpoint
from awq_jax.errors import AwqError, FormatError
from awq_jax.qtensor import QuantizedTensor

SECONDS = 10.0  # per case; a case takes milliseconds
MEMORY = 64 << 20  # bytes per case; the checkpoints have under half a megabyte
VARIANTS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "symmetric": {"bits": 4, "zeros": False},
    "8 bits": {"bits": 8},
    "8 bits symmetric": {"bits": 8, "zeros": False},
    "3 bits": {"bits": 3},
    "offsets": {"bits": 4, "offsets": True, "scale_dtype": ml_dtypes.bfloat16},
    "act-order": {"bits": 4, "perm": True},
    "wide": {"bits": 4, "zeros": False, "hidden": 256, "ffn": 256},
}
SHARD = 30_000  # bytes: several shards and an index; every other checkpoint is one file


@dataclasses.dataclass(frozen=True)
class Seed:
    """A sound checkpoint to start from: its files, or the one file of GGUF."""

    format: str
    variant: str
    files: Files
    truth: dict[str, np.ndarray]

    @property
    def mutations(self) -> dict[str, tuple[fuzz_mutations.Mutation, int]]:
        """Those that its container has."""
        if set(self.files) == {"model.gguf"}:
            return fuzz_mutations.GGUF
        return fuzz_mutations.DIRECTORY if fuzz_mutations.weights_of(self.files) else fuzz_mutations.ORBAX


@dataclasses.dataclass(frozen=True)
class Result:
    """``outcome``: refused, same (as before the mutation), changed (and rightly so), or what went wrong."""

    outcome: str
    detail: str = ""

    @property
    def wrong(self) -> bool:
        return self.outcome not in ("refused", "same", "changed")


def llama_config(hidden: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "float16",
    }  # fmt: skip


def weights(
    bits: int,
    zeros: bool = True,
    offsets: bool = False,
    perm: bool = False,
    scale_dtype: Any = np.float16,
    hidden: int = 64,
    ffn: int = 128,
) -> dict[str, Any]:
    """Random tensors of a llama of one layer, its linears packed in groups of 64."""
    rng = np.random.default_rng(bits)
    group = 64

    def packed(n: int, k: int) -> QuantizedTensor:
        scales = rng.uniform(0.01, 0.1, (k // group, n)).astype(scale_dtype)
        return linear.build(
            codes.pack(rng.integers(0, 1 << bits, (k, n)).astype(np.uint8), bits),
            scales,
            rng.integers(1, 1 << bits, scales.shape).astype(np.uint8) if zeros and not offsets else None,
            bits, group, k, n, "float32",
            offsets=(-scales * 7.5).astype(scale_dtype) if offsets else None,
            perm=rng.permutation(k).astype(np.int32) if perm else None,
        )  # fmt: skip

    def dense(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(np.float16)

    layer = "model.layers.0"
    out = {f"{layer}.self_attn.{p}_proj.weight": packed(hidden, hidden) for p in "qkvo"}
    out |= {f"{layer}.mlp.{p}_proj.weight": packed(ffn, hidden) for p in ("gate", "up")}
    out[f"{layer}.mlp.down_proj.weight"] = packed(hidden, ffn)
    out |= {f"{layer}.{p}_layernorm.weight": dense(hidden) for p in ("input", "post_attention")}
    return out | {
        "model.norm.weight": dense(hidden),
        "model.embed_tokens.weight": dense(64, hidden),
        "lm_head.weight": dense(64, hidden),
    }


def corpus(directory: Path) -> list[Seed]:
    """A sound checkpoint of every readable format in every variant that it holds, by the format's own encoder."""
    seeds: list[Seed] = []
    for number, (variant, options) in enumerate(VARIANTS.items()):
        source = directory / f"source-{number}"
        config = llama_config(options.get("hidden", 64), options.get("ffn", 128))
        write_checkpoint(source, weights(**options).items(), config, "awq-jax")
        (source / "generation_config.json").write_text('{"eos_token_id": 1, "bos_token_id": 0}')
        for position, (name, format) in enumerate(registry.FORMATS.items()):
            if format.encoder is None or (variant == "wide" and any(s.format == name for s in seeds)):
                continue
            path = directory / f"{name}-{number}{format.suffix}"
            with contextlib.suppress(FormatError):
                shard = SHARD if (number + position) % 2 else 1 << 30
                conversion.checkpoint(source, path, name, allow_lossy=True, max_shard_bytes=shard)
                seeds.append(Seed(name, variant, _files(path), reference(path)))
    return [*seeds, _gguf(directory / "model.gguf")]


def _gguf(path: Path) -> Seed:
    """A GGUF file by the ``gguf`` package."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (64, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 64), "ffn_up": (128, 64)}
    for number, (name, shape) in enumerate(shapes.items()):
        kind = [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1][
            number % 3
        ]
        data = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=kind)
    writer.add_tensor("token_embd.weight", rng.standard_normal((64, 64)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Seed("gguf", "by the gguf package", _files(path), reference(path))


def _files(path: Path) -> Files:
    if path.is_file():
        return {"model.gguf": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Watch:
    """Audits this process: what was opened, written, renamed or run outside the allowed folders."""

    def __init__(self, sandbox: Path) -> None:
        self.root, self.out, self.secret = (os.path.realpath(p) for p in (sandbox, sandbox / "out", sandbox / "secret"))
        self.compiled = os.path.realpath(os.environ.get("JAX_COMPILATION_CACHE_DIR", os.devnull))  # where JAX writes
        self.active = False
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.found.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and isinstance(flags, int):
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                real = os.path.realpath(os.fsdecode(path))
                if (writes and not self._inside(real)) or real.startswith((self.secret, "/dev/zero", "/etc/passwd")):
                    self.found.append(f"{'write' if writes else 'read'} of {real}")
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
            inside_open_directory = event in ("os.remove", "os.rmdir") and args[-1] != -1
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike) and not inside_open_directory:
                    real = os.path.realpath(os.fsdecode(path))
                    if not self._inside(real):
                        self.found.append(f"{event} of {real}")
        elif event in ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system", "os.exec"):
            self.found.append(f"{event} {args!r:.200}")

    def _inside(self, real: str) -> bool:
        inside = real.startswith((self.out + os.sep, self.compiled + os.sep))
        return inside or real in (self.compiled, os.devnull) or not real.startswith(os.sep)


class Fuzzer:
    """Runs cases in a sandbox directory; use it in one thread, the main one."""

    def __init__(self, sandbox: Path, seeds: list[Seed]) -> None:
        self.seeds, self.sandbox = seeds, sandbox
        self.watch = Watch(sandbox)
        secret = sandbox / "secret"
        secret.mkdir(parents=True)
        sound = next(s.files for s in seeds if fuzz_mutations.weights_of(s.files))
        (secret / "config.json").write_bytes(sound["config.json"])
        (secret / "model.safetensors").write_bytes(sound[fuzz_mutations.weights_of(sound)[0]])

    def case(self, number: int, seed: int = 0) -> tuple[Seed, str, Result]:
        """Case ``number``: the seed, the mutation's name and what came of it. The same numbers, the same case."""
        rng = random.Random(f"{seed}/{number}")
        start = self.seeds[number % len(self.seeds)]
        table = start.mutations
        files = None
        while files is None:
            (kind,) = rng.choices(list(table), [weight for _, weight in table.values()])
            files = table[kind][0](rng, start.files)
            twice = kind != "harmless" and table is not fuzz_mutations.GGUF and rng.random() < 0.1
            if files is not None and twice:  # now and then two at once
                (second,) = rng.choices(list(table), [weight for _, weight in table.values()])
                with contextlib.suppress(Exception):  # the second may not know what to do with the first
                    files = table[second][0](rng, files) or files
        result = self._run(start, files, convert=rng.choice(["", "", "", "", "awq-jax", "float"]))
        if kind == "harmless" and result.outcome != "same":
            result = Result("refused what is sound", result.outcome + ": " + result.detail)
        return start, kind, result

    def model(self, number: int, seed: int = 0) -> Result:
        """As `case`, for what ``config.json`` says of the model: loaded as it was, or refused."""
        rng = random.Random(f"model {seed}/{number}")
        start = next(s for s in self.seeds if s.format == "awq-jax")
        return self._run(start, fuzz_mutations.dimensions(rng, start.files), "", load=True)

    def _run(self, seed: Seed, files: Files, convert: str, load: bool = False) -> Result:
        src, out = self.sandbox / "src", self.sandbox / "out"
        for path in (src, out):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        write(src, files)
        before = _listing(src)
        path = opens(src, files)
        start = time.perf_counter()
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        try:
            with self.watch(), _time_limit():
                got = loaded(path) if load else read(path)
                if convert:
                    conversion.checkpoint(path, out / "dst", convert, allow_lossy=True, workers=1)
        except AwqError as e:
            if not str(e).strip() or len(str(e)) > 20_000:
                return Result("unhelpful error", repr(e)[:500])
            result = Result("refused", f"{type(e).__name__}: {e}")
            if os.listdir(out):
                result = Result("leftovers", f"{os.listdir(out)} after {e}")
        except _Hang:
            return Result("hang", f"over {SECONDS} s")
        except Exception as e:
            return Result(type(e).__name__, "".join(traceback.format_exception(e))[-2000:])
        else:
            result = _judge(seed, path, got, out / "dst" if convert else None)
        if self.watch.found:
            return Result("outside", "; ".join(self.watch.found))
        peak = tracemalloc.get_traced_memory()[1] - base
        if tracemalloc.is_tracing() and peak > MEMORY:
            return Result("memory", f"{peak >> 20} MiB, {result}")
        if _listing(src) != before:
            return Result("source changed", result.outcome)
        if time.perf_counter() - start > SECONDS:
            return Result("slow", result.outcome)
        return result


def opens(directory: Path, files: Files) -> Path:
    """What is to be opened in a directory of these files."""
    return directory / "model.gguf" if set(files) == {"model.gguf"} else directory


def write(directory: Path, files: Files) -> None:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Link):
            path.mkdir() if data.directory else path.symlink_to(data.target)
        else:
            path.write_bytes(data)


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, as our reader has it; headers must say the same as what is read."""
    source = registry.open_source(path, packed=True)
    out = {}
    for name in source.names():
        value = source.read(name)
        info = source.info(name) if hasattr(source, "info") else None
        if isinstance(value, QuantizedTensor):
            if info is not None:
                assert info.packed is not None
                assert (info.packed.bits, info.packed.group_size) == (value.bits, value.group_size), name
                assert info.packed.act_order == (value.perm is not None), name
            w = codes.dequantize(value, np.float64)
            value = w.T if value.axes == "nk" else w
        if info is not None:
            assert info.shape == tuple(value.shape), name
        assert tuple(source.shape(name)) == tuple(value.shape), name
        out[name] = value
    return out


def loaded(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint as the decoder has it."""
    from awq_jax.models.weights import params
    from awq_jax.serve import model

    source = registry.open_source(path)
    found = model.from_source(source, "float32")
    out = {}
    for name, value in params.tensors(found.params, found.config):
        out[name] = codes.dequantize(value, np.float64).T if isinstance(value, QuantizedTensor) else value
    if found.config.tied:  # the head is the embedding then, and a stored one is not looked at
        out["lm_head.weight"] = source.read("lm_head.weight")
    return out


def _judge(seed: Seed, path: Path, got: dict[str, np.ndarray], converted: Path | None) -> Result:
    try:
        want = reference(path)
    except UnicodeDecodeError:  # the gguf package takes no keys but UTF-8; these say nothing about weights
        want = seed.truth
    except BaseException as e:  # the readers in Rust panic with exceptions of their own
        if isinstance(e, KeyboardInterrupt):
            raise
        return Result("accepted", f"what the reference cannot read: {type(e).__name__}: {e}")
    if problem := differing(got, want):
        return Result("wrong weights", problem)
    if converted is not None:
        try:
            written = registry.open_source(converted)
        except AwqError as e:
            return Result("unreadable result", str(e))
        for name in written.names():
            value = written.read(name)
            if isinstance(value, QuantizedTensor):
                value = codes.dequantize(value, np.float64).T
            exact = want[name].astype(np.float64)
            if not np.allclose(value.astype(np.float64), exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max(initial=0)):
                return Result("wrong weights", f"{name} after conversion")
        if set(written.names()) != set(want):
            return Result("wrong weights", f"names after conversion: {set(written.names()) ^ set(want)}")
    return Result("changed" if differing(want, seed.truth) else "same")


def differing(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> str:
    """The first difference of names, shapes or values, or ""."""
    if set(got) != set(want):
        return f"names {sorted(set(got) ^ set(want))[:4]}"
    for name, value in want.items():
        a, b = got[name], value
        if a.shape != b.shape:
            return f"{name}: shape {a.shape} instead of {b.shape}"
        same = (a == b) | ((a != a) & (b != b))
        if not same.all():
            return f"{name}: {np.count_nonzero(~same)} of {same.size} values"
    return ""


def _listing(directory: Path) -> list[tuple[str, int, int]]:
    stats = [(str(p), p.lstat()) for p in sorted(directory.rglob("*"))]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


class _Hang(BaseException):
    pass


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass
class Tally:
    """Counts by format, mutation and outcome, and the cases that went wrong."""

    counts: collections.Counter[tuple[str, str, str]] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def total(self, outcome: str, format: str = "") -> int:
        return sum(n for (f, _, o), n in self.counts.items() if o == outcome and format in ("", f))


def run(directory: Path, seeds: list[Seed], cases: int, seed: int = 0, first: int = 0) -> Tally:
    """``cases`` cases from number ``first`` on, in a sandbox in ``directory``."""
    fuzzer = Fuzzer(directory / "sandbox", seeds)
    tally = Tally()
    tracemalloc.start()
    try:
        for number in range(first, first + cases):
            start, kind, result = fuzzer.case(number, seed)
            tally.counts[start.format, kind, result.outcome] += 1
            if result.wrong:
                tally.wrong.append(
                    f"case {number}, {start.format} ({start.variant}), {kind}: {result.outcome}: {result.detail}"
                )
    finally:
        tracemalloc.stop()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the checkpoint readers.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        seeds = corpus(Path(directory, "corpus"))
        tally = run(Path(directory), seeds, args.cases, args.seed, args.first)
    outcomes = sorted({o for _, _, o in tally.counts})
    for title, at in (("format", 0), ("mutation", 1)):
        print(f"{title:20}" + "".join(f"{o:>14.13}" for o in outcomes))
        for key in sorted({k[at] for k in tally.counts}):
            row = [sum(n for k, n in tally.counts.items() if k[at] == key and k[2] == o) for o in outcomes]
            print(f"{key:20}" + "".join(f"{n:>14}" for n in row))
    for line in tally.wrong[:40]:
        print(line)
    print(json.dumps({o: tally.total(o) for o in outcomes}), f"{time.perf_counter() - start:.1f} s")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
