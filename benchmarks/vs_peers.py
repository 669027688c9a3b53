"""Cost and quality of quantizing against other programs: one machine, one run, the same calibration tokens.

    tests/interop/make_envs.sh ENVS autoawq
    python benchmarks/vs_peers.py --envs ENVS --model SmolLM2.gguf --text wiki.txt --out r.json

The model is a float checkpoint: a directory, ``.gguf`` file or hub id. The first tokens of the text calibrate, the last
``--eval-tokens`` are scored.

Every quantization is a process of its own (start of Python, imports, loading the float checkpoint,
compilation, search, rounding, saving an AutoAWQ GEMM checkpoint), one after the other; its CPU seconds
(user + system, all threads), wall seconds and peak memory come from the kernel's accounting of that process.
All results are then loaded and scored by `awq_jax.evaluate`, in float32. Each program has a driver in ``peers/``, and
what belongs to it (a defect worked around, the dtype it computes in) is said there. A program without an environment is
listed as skipped.
"""

import functools
import operator
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from shared import checkpoints, peers, running

import awq_jax
from awq_jax import evaluate
from awq_jax.config import METHOD_NAMES, AwqConfig

# Method -> what its row is called.
OURS = {method: "default" if method == AwqConfig().method else method for method in METHOD_NAMES}
THEIRS = tuple(map(operator.attrgetter("name"), peers.QUANTIZERS))


def quantize(source: Path, calibration: Path, out: Path, group_size: int, method: str) -> None:
    """As a user of awq_jax does it."""
    model, tokens = awq_jax.load(source), np.load(calibration)
    model.quantize(tokens, seq_len=tokens.shape[1], progress=False, group_size=group_size, method=method)
    model.save(out, format="gemm")


def compare(
    *,
    model: str,
    text: Path,
    samples: int = 8,
    seq_len: int = 512,
    eval_tokens: int = 10240,
    context: int = 512,
    group_size: int = 64,
    methods: tuple[str, ...] = tuple(OURS),
    programs: tuple[str, ...] = THEIRS,
    envs: Path = peers.ENVS,
) -> running.Row:
    """The other programs, then the methods of awq_jax, each from an empty cache of programs and from a full one."""
    costs: dict[str, running.Cost] = {}
    versions: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    rows: list[running.Row] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        source, calibration = work / "float", work / "calibration.npy"
        loaded = awq_jax.load(model)
        loaded.save(source, format="float")
        tokens, scored = checkpoints.split(loaded.tokenizer, text, samples, seq_len, eval_tokens)
        np.save(calibration, tokens)
        del loaded
        for peer in (p for p in peers.QUANTIZERS if p.name in programs):
            if reason := peer.missing(envs):
                skipped[peer.name] = reason
                continue
            command = peer.command(envs, source, calibration, work / peer.name, "--group-size", str(group_size))
            costs[peer.name] = running.succeeded(command, work / f"{peer.name}.log").cost
            versions[peer.name] = peer.versions(envs)
        theirs = {name: cost.cpu for name, cost in costs.items()}
        for method in methods:
            name = f"awq_jax {OURS[method]}"
            # Cold, then with the programs that a run before it has left in a cache.
            kept = work / "programs"
            for suffix, cache in (("", None), (", filling the cache", kept), (", warm", kept)):
                given = source, calibration, work / (name + suffix), group_size, method
                with mock.patch.dict(os.environ, running.environment(cache), clear=True):
                    _, costs[name + suffix] = running.apart(quantize, *given)
                print(name + suffix, costs[name + suffix].row(), flush=True)
            del costs[name + ", filling the cache"]

        def perplexity(path: Path) -> evaluate.Perplexity:
            return evaluate.perplexity(awq_jax.load(path, dtype="float32"), scored, context=context)

        before = perplexity(source)
        for name, cost in costs.items():
            after = perplexity(work / name)
            # Both models read the same windows: the error of the difference is that of the paired means.
            delta, error = evaluate.difference(after, before)
            ratios = {f"{peer}_cpu_over_this": round(cpu / cost.cpu, 1) for peer, cpu in theirs.items()}
            lost = {"ppl": after.ppl, "delta_nll": delta, "delta_nll_standard_error": error}
            rows.append({"name": name} | lost | cost.row() | ratios)
            print(rows[-1], flush=True)
    return {
        "model": Path(model).name,
        "text": text.name,
        "bits": 4,
        "group_size": group_size,
        "calibration_tokens": [samples, seq_len],
        "scored_tokens": before.tokens,
        "context": context,
        "float_ppl": before.ppl,
        "rows": rows,
        "skipped": skipped,
        "versions": versions,
        "device": str(jax.devices()[0]),
        **running.machine(),
    }


def smoke(directory: Path) -> Iterator[list[str]]:
    model, text = checkpoints.tiny(directory)
    tiny = ["--samples", "2", "--seq-len", "16", "--eval-tokens", "32", "--context", "16", "--group-size", "32"]
    none = ["--envs", str(directory), "--methods", "rtn"]
    yield ["--model", model, "--text", text, *tiny, *none, "--out", str(directory / "r.json")]


main = functools.partial(running.run, (compare,), smoke)

if __name__ == "__main__":
    main()
