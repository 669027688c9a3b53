"""A float-trained adapter on the AWQ checkpoint of its model: as it is, and rescaled by the folded scales.

    python benchmarks/lora.py MODEL --text wiki.txt --bits 4 --group-size 32 --out results/lora.json

The model is first quantized (calibrated on the text's beginning). Adapters of all linears are trained on the text after
that, on the float model and on the packed one, from the same draw and on the same batches; all are scored on the text's
end. ``lost`` is against the float model with its own adapter. ``--outliers S`` first plants, in a model that computes
the same, outlier channels: every norm's gain is multiplied by S in some channels whose weights are divided by it,
so that activations have them. Also: what ``init="error"`` recovers, untrained, against a plain SVD of the error.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import checkpoints, running

import awq_jax
from awq_jax import lora, paths
from awq_jax.adapters import base as bases
from awq_jax.adapters import files
from awq_jax.lora import error_init
from awq_jax.serve.model import Model

Apply = Callable[..., jax.Array]


def nll(apply: Apply, adapters: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    """Mean negative log likelihood of each token after the first, in nats."""
    logits = apply(adapters, frozen, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(apply: Apply, adapters: Any, frozen: Any, batches: np.ndarray, rate: float) -> tuple[Any, float]:
    """Adapters after a step on each of ``batches [S, B, T]`` with Adam, and seconds per step without the first."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(batches)))
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters: Any, state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda a: nll(apply, a, frozen, tokens))(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state

    start = 0.0
    for i, tokens in enumerate(batches):
        adapters, state = step(adapters, state, frozen, jnp.asarray(tokens))
        if i == 0:
            jax.block_until_ready(adapters)
            start = time.perf_counter()
    jax.block_until_ready(adapters)
    return adapters, (time.perf_counter() - start) / max(len(batches) - 1, 1)


def score(apply: Apply, adapters: Any, frozen: Any, held: np.ndarray) -> float:
    """NLL on ``held [rows, T]``, eight rows at a time."""
    run = jax.jit(functools.partial(nll, apply))
    return float(np.mean([run(adapters, frozen, jnp.asarray(held[i : i + 8])) for i in range(0, len(held), 8)]))


def planted(model: Model, size: float, share: float = 0.02) -> None:
    """The same function with outliers: gains of norms times ``size`` in some channels, over it in what reads them."""
    rng = np.random.default_rng(0)
    flat = paths.flatten(model.params)
    reads = {"input_layernorm": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
             "post_attention_layernorm": ("mlp/gate_proj", "mlp/up_proj")}  # fmt: skip
    for path, gain in list(flat.items()):
        layer, _, norm = path.removesuffix("/scale").rpartition("/")
        if norm in reads:
            factor = np.ones(gain.shape, np.float32)
            factor[rng.choice(len(factor), max(1, int(share * len(factor))), replace=False)] = size
            flat[path] = gain * factor
            for name in reads[norm]:
                kernel = f"{layer}/{name}/kernel"
                flat[kernel] = flat[kernel] / factor[:, None]
    model.params = paths.map_with_path(lambda path, _: flat[path], model.params)


def recovered(model: Model, packed: Model, report: Any, calib: np.ndarray, held: np.ndarray, rank: int) -> running.Row:
    """Share of what quantizing lost that an untrained correction recovers: weighted by the Gram, and plain."""
    calibration = awq_jax.calibrate(model.apply, model.params, [calib[i : i + 4] for i in range(0, len(calib), 4)])
    original = lora.Original(model.params, report.scales)
    gone = jnp.zeros(())
    before = score(lambda _, p, x: model.apply(p, x), gone, model.params, held)
    after = score(lambda _, p, x: packed.apply(p, x), gone, packed.params, held)
    out: dict[str, Any] = {"float": before, "packed": after}
    given: dict[str, Any] = {"rank": rank, "init": "error", "calib": calibration, "original": original}
    best = error_init.weighted
    for name, weighted in (("gram", best), ("plain", lambda error, gram, rank: best(error, None, rank))):
        with mock.patch.object(error_init, "weighted", weighted):
            apply, adapters, frozen = lora.add(packed, **given)
        out[name] = (after - score(apply, adapters, frozen, held)) / (after - before)
    return out


def lora_on_awq(
    model: str,
    *,
    text: Path,
    bits: int = 4,
    group_size: int = 32,
    rank: int = 16,
    steps: int = 200,
    rows: int = 4,
    length: int = 128,
    held_rows: int = 64,
    rate: float = 1e-3,
    outliers: float = 0.0,
    samples: int = 16,
    corrections: bool = False,
) -> running.Row:
    """All of it on one model."""
    with tempfile.TemporaryDirectory() as work:
        floats = awq_jax.load(model)
        if outliers:
            planted(floats, outliers)
        floats.save(Path(work, "float"))
        need = steps * rows * (length + 1)
        calib, rest = checkpoints.split(floats.tokenizer, text, samples, length, need + held_rows * (length + 1))
        rest = np.asarray(rest[: need + held_rows * (length + 1)], np.int32)
        batches = rest[:need].reshape(steps, rows, length + 1)
        held = rest[need:].reshape(held_rows, length + 1)
        packed = awq_jax.load(Path(work, "float"))
        report = packed.quantize(calib, seq_len=length, bits=bits, group_size=group_size, progress=False)
        packed.save(Path(work, "packed"), "awq-jax")
        scales = np.concatenate([s.input.reshape(-1) for s in report.scales.values() if s.input is not None])
        out: dict[str, Any] = {"bits": bits, "group_size": group_size, "outliers": outliers, "steps": steps}
        out["scales"] = [float(scales.min()), float(scales.max())]
        apply, drawn, params = lora.add(floats, rank=rank)
        out["float"] = score(apply, drawn, params, held)
        trained, out["float_step_seconds"] = train(apply, drawn, params, batches, rate)
        out["float_adapter"] = score(apply, trained, params, held)
        own: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank}
        lora.save(lora.adapter(floats, trained, base=str(Path(work, "float")), **own), Path(work, "adapter"))
        onto, start, frozen = lora.add(packed, rank=rank)
        out["packed"] = score(onto, start, frozen, held)
        for name, terms in (("as_is", "base"), ("rescaled", "auto")):
            fitted = bases.fitted(files.read(Path(work, "adapter")), bases.of(Path(work, "packed")), terms)
            factors = lora.factors(packed, fitted, **own)
            out[name] = score(onto, factors, frozen, held)
            out[f"{name}_lost"] = out[name] - out["float_adapter"]
        there, out["packed_step_seconds"] = train(onto, start, frozen, batches, rate)
        out["trained_on_packed"] = score(onto, there, frozen, held)
        out["trained_on_packed_lost"] = out["trained_on_packed"] - out["float_adapter"]
        out["ratio"] = out["rescaled_lost"] / out["as_is_lost"]
        if corrections:
            out["recovered"] = recovered(floats, packed, report, calib, held, rank)
    return out


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    text = checkpoints.token_file(directory / "model", directory, 16, 16)
    quick = ["--rank", "2", "--steps", "2", "--rows", "2", "--length", "8", "--held-rows", "8", "--samples", "4"]
    yield [
        model,
        "--text",
        str(text),
        "--group-size",
        "32",
        *quick,
        "--outliers",
        "4",
        "--corrections",
        "--out",
        str(directory / "r.json"),
    ]


main = functools.partial(running.run, (lora_on_awq,), smoke)

if __name__ == "__main__":
    main()
