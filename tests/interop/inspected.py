"""What `awq-jax inspect --for ENGINE` says of what our commands write, beside what the engine does with it.

    AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/inspected.py [--engine ENGINE] [--only TEXT]

writes benchmarks/results/inspect.json, a list of rows, and inspect.md. Small models of random weights go through
``awq-jax quantize`` and ``awq-jax convert`` to every format and in every way of packing that is told apart; each engine
then reads each file of a format that it may read, and one file of every other format. ``tests/convert/test_engines.py``
holds the rules to the rows, and ``test_inspect_is_true.py`` the rows to the engines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import consumers  # first: it finds the tests' helpers
import numpy as np
import peers
from safetensors.numpy import load_file, save_file
from vllm_families import as_published, log_softmax

import awq_jax
from awq_jax import cli, convert
from awq_jax.convert.engines import rules, verdicts
from awq_jax.convert.engines.contents import Contents, Linear, contents
from awq_jax.convert.registry import FORMATS
from awq_jax.errors import FormatError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "inspect.json"
# Of the log-probabilities: of engines that compute in float16, and of one that rounds activations to 8 bits.
CLOSE = {"vllm": 0.05, "transformers": 0.05, "tpu-inference": 0.02, "mlx": 0.02, "llama.cpp": 0.1}
# Heads have 64 numbers, which vLLM's JAX engine does not pad; `ODD` has linears that no tile of 64 or 128 divides.
TWO = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "sliding_window": 128}
SIZES = TWO | {"num_hidden_layers": 1}
ODD = SIZES | {"intermediate_size": 352}
ODDER = SIZES | {"intermediate_size": 336}  # which no 32 divides
NARROW = ("gemm", "compressed-tensors", "gptq", "mlx")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model, quantized once and written in several formats.

    Attributes:
      family: of the model.
      options: of ``quantize``.
      formats: that it is converted to, where they hold it.
      sizes: of the model.
      change: of the quantized checkpoint, before it is converted.
    """

    family: str
    options: str = ""
    formats: tuple[str, ...] = NARROW
    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: SIZES)
    change: str = ""

    @property
    def name(self) -> str:
        """Also of the directory."""
        told = re.sub(r"--|[.*^$()\\]", "", self.options).replace(":", " ").replace("=", " ")
        odd = "odd " if self.sizes is ODD else "odder " if self.sizes is ODDER else ""
        return " ".join(f"{self.family} {odd}{told} {self.change}".split())


EVERY = tuple(FORMATS)
PLANS = (
    Plan("llama", "--group-size 32 --symmetric", EVERY),
    Plan("llama", "--group-size 128", EVERY),
    Plan("llama", "--group-size 128 --symmetric"),
    *(Plan("llama", f"--group-size {g}{s}") for g in (64, -1) for s in ("", " --symmetric")),
    Plan("llama", "--group-size 32"),
    Plan("llama", "--group-size 16"),
    Plan("llama", "--group-size 16 --symmetric"),
    Plan("llama", "--group-size 256 --symmetric"),
    *(Plan("llama", f"--bits {b} --group-size 64{s}") for b in (2, 3, 8) for s in ("", " --symmetric")),
    Plan("llama", "--bits 8 --group-size 32 --symmetric", ("gguf-q8_0",)),
    Plan("llama", "--bits 8 --group-size -1 --symmetric"),
    Plan("llama", "--bits 8 --group-size -1"),
    Plan("llama", "--group-size 32 --symmetric --quantize-head", (*NARROW, "gguf-q4_0")),
    Plan("llama", "--group-size 64 --quantize-head"),
    Plan("qwen3", "--group-size 64 --symmetric --quantize-head"),
    Plan("qwen3", "--group-size 64 --quantize-head"),
    Plan("qwen2", "--group-size 32 --symmetric --quantize-head"),
    Plan("llama", "--group-size 64 --symmetric", change="in act-order"),
    Plan("llama", "--group-size -1 --symmetric", change="in act-order"),
    Plan("llama", "--group-size 32 --symmetric --skip down_proj"),
    Plan("llama", "--group-size 32 --skip layers/0/", sizes=TWO),
    Plan("llama", "--group-size 32 --symmetric --override down_proj:bits=8"),
    Plan("llama", "--group-size 32 --symmetric --override q_proj:bits=8"),
    Plan("llama", "--group-size 32 --symmetric --override down_proj:group_size=64"),
    Plan("llama", "--group-size 32 --override down_proj:symmetric=true"),
    Plan("llama", "--group-size 32 --symmetric", sizes=ODD),
    Plan("llama", "--group-size 32", sizes=ODD),
    Plan("llama", "--group-size 64 --on-indivisible pad", sizes=ODD),
    Plan("llama", "--group-size 64 --symmetric --on-indivisible pad", sizes=ODD),
    Plan("llama", "--group-size 64 --on-indivisible float", sizes=ODD),
    Plan("llama", "--group-size -1 --symmetric", sizes=ODD),
    Plan("llama", "--group-size 16 --symmetric", sizes=ODDER),
    Plan("llama", "--group-size -1", sizes=ODDER),
    Plan("llama", "--group-size 32 --serve-dtype bfloat16"),
    Plan("qwen2", "--group-size 64"),
    Plan("qwen3", "--group-size 64 --symmetric", (*NARROW, "gptq-v2", "gguf-q8_0")),
    Plan("mistral", "--group-size 32"),
    Plan("phi3", "--group-size 32"),
    Plan("mixtral", "--group-size 32"),
    Plan("mixtral", "--group-size 32 --symmetric"),
    Plan("qwen3_moe", "--group-size 32"),
    Plan("starcoder2", "--group-size 32 --symmetric"),
    Plan("falcon", "--group-size 32"),
    Plan("gpt2", "--group-size 32 --symmetric"),
    Plan("opt", "--group-size 32 --symmetric"),
    Plan("bloom", "--group-size 32 --symmetric"),
)


def in_act_order(directory: Path) -> None:
    """Deal a GPTQ checkpoint's channels to groups at random: other weights, and a file as act-order leaves them."""
    file = directory / "model.safetensors"
    tensors, rng = load_file(file), np.random.default_rng(3)
    for name in tensors:
        if name.endswith(".g_idx"):
            tensors[name] = rng.permutation(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (directory / "config.json").write_text(json.dumps(config))


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint of the matrix.

    Attributes:
      name: of its plan and format.
      path: of the directory or file.
      contents: what rules look at, of one layer.
      ours: log-probabilities ``[T, V]`` of `consumers.IDS`.
      everywhere: engines that do not read its format are tried too.
    """

    name: str
    path: Path
    contents: Contents
    ours: np.ndarray
    everywhere: bool


def quantize(source: Path, target: Path, *options: str) -> None:
    """Our command, quietly, by plain rounding."""
    command = ["quantize", str(source), str(target), "--method", "rtn", "--quiet", *options]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        failed = cli.main(command)
    if failed:
        raise RuntimeError(told.getvalue())


def write(plans: Sequence[Plan], work: Path) -> list[Written]:
    """The matrix. What a format does not hold is left out."""
    found = []
    for number, plan in enumerate(plans):
        source = work / "float" / f"{plan.family}-{'-'.join(map(str, plan.sizes.values()))}"
        if not source.exists():
            with mock.patch.dict(consumers.SIZES, plan.sizes):
                as_published(consumers.float_checkpoint(plan.family, source), plan.family)
        packed = work / "packed" / str(number)
        quantize(source, packed, "--format", "gptq" if plan.change else "awq-jax", *plan.options.split())
        if plan.change:
            in_act_order(packed)
        before = log_probabilities(packed)
        for format in plan.formats:
            target = work / "written" / (f"{number}-{format}" + ".gguf" * format.startswith("gguf"))
            try:
                done = convert.checkpoint(packed, target, to=format, allow_lossy=True)
            except FormatError:
                continue
            held = of_one_layer(contents(convert.open_source(target, packed=True)))
            ours = log_probabilities(target) if done.inexact else before
            found.append(Written(f"{plan.name} -> {format}", target, held, ours, plan.formats is EVERY))
    return found


def log_probabilities(checkpoint: Path) -> np.ndarray:
    """Ours, ``[T, V]``, of `consumers.IDS`, in float32."""
    return log_softmax(np.asarray(awq_jax.load(checkpoint, dtype="float32")(consumers.IDS[None]))[0])


def of_one_layer(held: Contents) -> Contents:
    """Without the layers that are packed as the first one that is packed so."""
    kept: dict[Any, Linear] = {}
    for x in held.linears:
        kept.setdefault(dataclasses.replace(x, name=re.sub(r"\.\d+\.", ".N.", x.name)), x)
    config = {k: v for k, v in held.config.items() if k in ("model_type", "dtype", "torch_dtype", "head_dim")}
    return dataclasses.replace(held, config=config, linears=tuple(kept.values()))


def by_vllm(these: Sequence[Written], work: Path, out: Path) -> None:
    left = list(these)
    while left:  # where it takes its process with it, the rest in another
        before = len(left)
        peers.try_to_drive("vllm", "read_vllm.py", "chosen", "float16", work / "ids.npy", out, *[w.path for w in left])
        left = [w for w in left if not any(outcome_files(out, w)[i].exists() for i in (0, 1))]
        assert len(left) < before, "the engine's process starts with none of them"


def by_transformers(these: Sequence[Written], work: Path, out: Path) -> None:
    gptqmodel = [w for w in these if w.contents.format not in ("compressed-tensors", "float", "awq-jax", "mlx")]
    rest = [w for w in these if w not in gptqmodel]
    for environment, some in (("gptqmodel", gptqmodel), ("transformers", rest)):
        if some:
            peers.drive(environment, "read_many.py", "transformers", work / "ids.npy", out, *[w.path for w in some])


def by_tpu_inference(these: Sequence[Written], work: Path, out: Path) -> None:
    arguments = ("yes", 1, "float32", work / "ids.npy", out, *[w.path for w in these])
    peers.drive("tpu-inference", "read_tpu_inference.py", *arguments)


def by_mlx(these: Sequence[Written], work: Path, out: Path) -> None:
    peers.drive("mlx", "logits_mlx.py", work / "ids.npy", out, *[w.path for w in these])


def by_llamacpp(these: Sequence[Written], work: Path, out: Path) -> None:
    for w in these:
        result, refusal = outcome_files(out, w)
        done = peers.try_to_drive("llamacpp", "logits_llamacpp.py", w.path, work / "ids.npy", result)
        if done.returncode:
            refusal.write_text(next(iter(done.stderr.strip().splitlines()[::-1]), "the process died"))


ENGINES: dict[str, Callable[[Sequence[Written], Path, Path], None]] = {
    "vllm": by_vllm,
    "transformers": by_transformers,
    "tpu-inference": by_tpu_inference,
    "mlx": by_mlx,
    "llama.cpp": by_llamacpp,
}
ENVIRONMENTS = {"vllm": ("vllm",), "transformers": ("transformers", "gptqmodel"), "tpu-inference": ("tpu-inference",)}
ENVIRONMENTS |= {"mlx": ("mlx",), "llama.cpp": ("llamacpp",)}


def outcome_files(out: Path, w: Written) -> tuple[Path, Path]:
    """Where a driver leaves log-probabilities or logits, or the engine's refusal."""
    return out / f"{w.path.name}.npy", out / f"{w.path.name}.txt"


def outcome(out: Path, w: Written, work: Path) -> dict[str, Any]:
    """``{"difference": d}`` of the log-probabilities (None: not numbers), or ``{"error": text}``."""
    result, refusal = outcome_files(out, w)
    if refusal.exists():
        text = re.sub(r"\s+", " ", refusal.read_text().replace(str(work), ""))
        return {"error": re.sub(r"0x[0-9a-f]+", "0x", text)[:300]}
    theirs = log_softmax(np.load(result)[:, : w.ours.shape[1]])
    difference = float(np.abs(theirs - w.ours).max())
    return {"difference": float(f"{difference:.1e}") if np.isfinite(difference) else None}


def served(engine: str, found: Mapping[str, Any]) -> bool:
    """Whether an engine computed what we do."""
    return found.get("difference") is not None and found["difference"] < CLOSE[engine]


def run(plans: Sequence[Plan], chosen: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """Rows: ``name``, ``contents`` (see `contents_of`), ``found``, by engine what `outcome` says, and ``gpus``."""
    work.mkdir(exist_ok=True)
    np.save(work / "ids.npy", consumers.IDS.astype(np.int32))
    written = write(plans, work)
    rows: dict[str, dict[str, Any]] = {}
    for w in written:
        held = w.contents
        linears = [list(dataclasses.astuple(x)) for x in held.linears]
        told = {"format": held.format, "config": held.config, "linears": linears, "scaled": list(held.scaled)}
        rows[w.name] = {"name": w.name, "contents": told, "found": {}}
    for engine in chosen:
        out = work / f"out-{engine}"
        out.mkdir()
        these = [w for w in written if w.everywhere or w.contents.format in rules.READS[engine]]
        if engine == "tpu-inference":  # the rest was not run, says `inspect`; no float loads there
            these = [w for w in these if w.contents.family in rules.PLUGIN_RUN and w.contents.format != "float"]
        ENGINES[engine](these, work, out)
        for w in these:
            rows[w.name]["found"][engine] = found = outcome(out, w, work)
            print(engine, "|", w.name, "|", found, "|", verdicts.verdict(engine, w.contents).line(), flush=True)
    if "vllm" in chosen:
        for name, kernels in on_gpus(written, work).items():
            rows[name]["gpus"] = kernels
    return list(rows.values())


def contents_of(row: Mapping[str, Any]) -> Contents:
    """What rules look at, of a row."""
    held = row["contents"]
    linears = tuple(Linear(name, tuple(shape), *rest) for name, shape, *rest in held["linears"])
    return Contents(held["format"], held["config"], linears, tuple(held["scaled"]))


def on_gpus(written: Sequence[Written], work: Path) -> dict[str, dict[str, str]]:
    """vLLM's own choice of kernels for each checkpoint on GPUs, see ``kernels_vllm.py``: the first refusal, if any.

    Experts have kernels of their own, and are left out.
    """
    asked = [
        (w.name, {"format": held.format, "bits": x.bits, "symmetric": x.symmetric, "act_order": x.act_order}
         | {"group_size": -1 if x.whole else x.group_size, "shape": x.shape})
        for w in written if (held := w.contents).format in rules.PACKED
        for x in held.linears if not rules.MOE_CONVERTED.search(x.name)
    ]  # fmt: skip
    (work / "linears.json").write_text(json.dumps([linear for _, linear in asked]))
    peers.drive("vllm", "kernels_vllm.py", work / "linears.json", work / "kernels.json")
    found: dict[str, dict[str, str]] = {}
    for (name, _), kernels in zip(asked, json.loads((work / "kernels.json").read_text()), strict=True):
        kept = found.setdefault(name, kernels)
        kept.update(
            {k: v[:300] for k, v in kernels.items() if v.startswith("error") and not kept[k].startswith("error")}
        )
    return found


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results in Markdown."""
    head = [*ENGINES, "kernels on GPUs of 7.5, 8.0, 9.0"]
    lines = ["| weights -> format | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for row in sorted(rows, key=lambda r: r["name"]):
        cells = [cell(engine, row["found"].get(engine)) for engine in ENGINES]
        kernels = [v if v.startswith("error") else v.removesuffix("Kernel") for v in row.get("gpus", {}).values()]
        told = ", ".join(dict.fromkeys(k.removesuffix("Linear")[:40] for k in kernels))
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {told} |")
    return (
        "# What engines do with what our commands write\n\n"
        "Made by `AWQ_JAX_INTEROP_ENVS=DIR python tests/interop/inspected.py` with the environments of "
        "`tests/interop/make_envs.sh`, all on a CPU. A number is the largest difference of the log-probabilities of "
        f"{len(consumers.IDS)} tokens from ours of the same file (allowed: "
        + ", ".join(f"{engine} {bound:g}" for engine, bound in CLOSE.items())
        + "; more is in bold), of a small model of random weights, plainly rounded by `awq-jax quantize` with the "
        "options named; a text is the engine's own error. vLLM computes in float16, says itself whether it has a "
        "kernel, and its kernels for 4 bits are replaced by dequantization; transformers has GPTQModel's kernels "
        "for gemm and gptq. tpu-inference has `awq_jax.vllm` beside it. The last column is what vLLM's own choice of "
        "kernels answers, asked as on NVIDIA GPUs of three generations, in float16: no GPU was there.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def cell(engine: str, found: Mapping[str, Any] | None) -> str:
    """One of the table."""
    if found is None:
        return ""
    if "error" in found:
        return found["error"].replace("|", "\\|")[:160]
    return f"{found['difference']:.0e}" if served(engine, found) else f"**{found['difference']}**"


def save(rows: Sequence[dict[str, Any]]) -> None:
    """Into the results, in the place of rows of the same names; engines that were not run keep what they had."""
    kept = {r["name"]: r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for row in rows:
        before = kept.get(row["name"], {})
        kept[row["name"]] = before | row | {"found": before.get("found", {}) | row["found"]}
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in kept.values()) + "\n]\n")
    RESULTS.with_suffix(".md").write_text(page(list(kept.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="plans with one of these in their names"
    )
    args = parser.parse_args()
    plans = [p for p in PLANS if any(text in p.name for text in args.only)]
    with tempfile.TemporaryDirectory() as work:
        save(run(plans, args.engine or list(ENGINES), Path(work)))


if __name__ == "__main__":
    main()
