"""Time and memory of quantizing, and of decoding on a CPU, each against the float model.

    python benchmarks/speed.py quantize MODEL --text wiki.txt --samples 8 32 128 --out benchmarks/results/speed.json
    python benchmarks/speed.py decode --shape smollm2-135m --group-size 64 --out benchmarks/results/decode_cpu_135m.json
    python benchmarks/speed.py decode --model stories15m --group-size 96 --rounds 201
    python benchmarks/speed.py decode --shape llama-2-7b --layers 4 --rounds 21
    python benchmarks/speed.py start MODEL --before OLD/bin/python --out benchmarks/results/start_smollm2.json

`quantize`: every run is a process of its own (import, load, compile and work), one after the other on the same
machine. ``forward`` computes the logits of all tokens with the float model under `jax.jit`; the method's row
calibrates on them and quantizes. Both take four sequences at a time.

`decode`: all kinds live in one process and take turns, so that a busy machine is busy for each. ``dense`` is the
float32 model as `generate` serves it, ``packed`` the packed model as `generate` serves it unasked,
``packed-unmerged`` the same with ``merge=False``, ``packed-copy`` with ``resident=True`` (a float32 copy). Weights are
rounded to nearest; ``dense`` has the same ones, dequantized. Speeds are medians over rounds of the ratio to ``dense``
in the same round; on a busy machine the best turns and processor time say more.

`start`: whole processes that import the package, load a model with its tokenizer, and generate the first token of a
prompt. Builds take turns: this one, and that of another interpreter (``--before``). ``cold`` begins with an empty cache
of compiled programs, and ``warm`` with what that process has left there.
"""

import functools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tokenizers
from shared import checkpoints, running

import awq_jax
from awq_jax import paths
from awq_jax.bench import decoding, random_models
from awq_jax.bench.timing import device
from awq_jax.models.weights import params as model_params
from awq_jax.serve.cpu_copy import resident
from awq_jax.serve.served_weights import ServedWeights

ROWS = 4  # sequences at a time
FORWARD = "forward"
# Kind of decoding -> (merge_linears, copy) of `ServedWeights`; None leaves it to the package.
KINDS: dict[str, tuple[bool | None, bool | None]] = {
    "dense": (None, None),
    "packed": (None, None),
    "packed-unmerged": (False, None),
    "packed-copy": (None, True),
}
# A process of `start`; -P: the package is that of its interpreter, not the one in this directory.
FIRST_TOKEN = """
import sys
import awq_jax
[text] = awq_jax.load(sys.argv[1]).generate(sys.argv[2], max_new_tokens=1)
print(repr(text))
"""


def work(
    path: str, text: Path, samples: int, seq_len: int, bits: int, group_size: int, method: str
) -> dict[str, float]:
    """One run; seconds by phase if it quantizes."""
    model = awq_jax.load(path)
    tokens, _ = checkpoints.split(model.tokenizer, text, samples, seq_len)
    batches = [tokens[i : i + ROWS] for i in range(0, len(tokens), ROWS)]
    if method != FORWARD:
        _, report = awq_jax.quantize(
            model.params, batches, apply_fn=model.apply, bits=bits, group_size=group_size, method=method,
            explicit_scale=False, progress=False, return_report=True,
        )  # fmt: skip
        return dict(report.seconds)
    forward = jax.jit(lambda p, t: model.apply(p, t).max(axis=-1))
    for batch in batches:
        jax.block_until_ready(forward(model.params, batch))
    return {}


def quantize(
    model: str,
    *,
    text: Path,
    samples: tuple[int, ...] = (8, 32, 128),
    seq_len: int = 512,
    method: str = "awq+gptq",
    bits: int = 4,
    group_size: int = 64,
) -> running.Row:
    """Against the plain forward pass over the same tokens."""
    rows: list[running.Row] = []
    for count in samples:
        (_, plain), (phases, cost) = (
            running.apart(work, model, text, count, seq_len, bits, group_size, what) for what in (FORWARD, method)
        )
        ratios = {
            "wall_vs_forward": cost.wall / plain.wall,
            "cpu_vs_forward": cost.cpu / plain.cpu,
            "search_vs_forward": (phases["search"] + phases["round"]) / plain.wall,
        }
        seconds = {"seconds_by_phase": running.rounded(phases), **running.rounded(ratios, 2)}
        for what, row in ((FORWARD, plain.row()), (method, cost.row() | seconds)):
            rows.append({"samples": count, "work": what, "tokens": count * seq_len, **row})
            print(rows[-1], flush=True)
    return {
        "model": Path(model).name, "bits": bits, "group_size": group_size, "method": method,
        **running.machine(), "rows": rows,
    }  # fmt: skip


def decode(
    *,
    shape: str = "smollm2-135m",
    layers: int | None = None,
    model: str = "",
    dtype: str = "float32",
    bits: int = 4,
    group_size: int = 64,
    context: int = 32,
    steps: int = 4,
    rounds: int = 41,
) -> running.Row:
    """Packed weights on a CPU, with and without the float32 copy.

    Of random weights in a shape of `awq_jax.bench.random_models.SHAPES`, or of its first ``--layers``; or of a
    ``--model``. A turn is of so many ``--steps``; ``--dtype`` is that of the shape's floats and activations.
    """
    if model:
        loaded = awq_jax.load(model, dtype="float32")
        # Rounding to nearest reads no statistics, so any tokens will do.
        tokens = np.zeros((1, 16), int)
        loaded.quantize(tokens, seq_len=16, progress=False, bits=bits, group_size=group_size, method="rtn")
        c, packed = loaded.config, loaded.params
        graphdef, _ = model_params.abstract(c)
    else:
        c = random_models.config(shape, layers)
        graphdef, packed = random_models.random_model(c, dtype, bits, group_size)

    def timer(kind: str) -> decoding.DecodingTimer:
        params = resident(packed) if kind == "dense" else jax.tree.map(lambda a: a, packed)
        return decoding.DecodingTimer(ServedWeights(graphdef, c, params, *KINDS[kind]), context=context, steps=steps)

    timers = {kind: timer(kind) for kind in KINDS}
    rows: list[running.Row] = []
    for kind, times in decoding.paired(timers, "dense", rounds).items():
        one = timers[kind]
        rows.append({"kind": kind, **times, "served": one.weights.explain(), "served_bytes": paths.nbytes(one.params),
                     "packed_bytes": None if kind == "dense" else paths.nbytes(packed),
                     "step_temp_bytes": one.temp_bytes()["step"]})  # fmt: skip
        print(
            f"{kind:12s} {times['ms_per_step']:8.2f} ms per token, {times['speed']:.2f} times dense "
            f"(quartiles {times['speed_low']:.2f}, {times['speed_high']:.2f}; processor time {times['cpu_speed']:.2f})"
        )
    return device() | running.machine() | {
        "model": Path(model).name or shape, "layers": len(c.layers), "dtype": dtype, "bits": bits,
        "group_size": group_size, "context": context, "steps": steps, "rounds": rounds, "decode": rows,
    }  # fmt: skip


def start(model: str, *, before: str = "", prompt: str = "The capital of France is", rounds: int = 5) -> running.Row:
    """Processor seconds and memory until the first token."""
    builds = {"now": sys.executable} | ({"before": before} if before else {})
    costs: dict[tuple[str, str], list[running.Cost]] = {}
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        for i in range(rounds):
            for build, python in builds.items():
                cache = {
                    "JAX_COMPILATION_CACHE_DIR": str(Path(directory) / f"{build}-{i}"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_ENABLE_COMPILATION_CACHE": "true",
                }
                for kind in ("cold", "warm"):
                    done = running.succeeded([python, "-P", "-c", FIRST_TOKEN, model, prompt], log, os.environ | cache)
                    costs.setdefault((build, kind), []).append(done.cost)
                    said[build] = log.read_text().splitlines()[-1]
    rows: list[running.Row] = []
    for (build, kind), found in costs.items():
        cpu, wall = [c.cpu for c in found], [c.wall for c in found]
        seconds = {
            "cpu_seconds_min": min(cpu),
            "cpu_seconds_median": statistics.median(cpu),
            "wall_seconds_min": min(wall),
        }
        peaks = {"peak_rss_mb": max(c.peak_mb for c in found)}
        rows.append({"build": build, "cache": kind, **running.rounded(seconds, 2), **peaks, "text": said[build]})
        print(rows[-1], flush=True)
    return {"model": Path(model).name, "prompt": prompt, "rounds": rounds, **running.machine(), "rows": rows}


def smoke(directory: Path) -> Iterator[list[str]]:
    model, text = checkpoints.tiny(directory)
    quick = ["--samples", "2", "--seq-len", "16", "--method", "rtn", "--group-size", "32"]
    yield ["quantize", model, "--text", text, *quick, "--out", str(directory / "r.json")]
    yield ["decode", "--model", model, "--context", "16", "--steps", "2", "--rounds", "2", "--group-size", "32"]
    words = tokenizers.models.WordLevel({chr(i): i for i in range(128)}, unk_token="?")
    tokenizers.Tokenizer(words).save(f"{model}/tokenizer.json")
    yield ["start", model, "--prompt", "a", "--rounds", "1"]


main = functools.partial(running.run, (quantize, decode, start), smoke)

if __name__ == "__main__":
    main()
