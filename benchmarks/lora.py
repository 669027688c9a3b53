"""A float-trained adapter on the AWQ checkpoint of its model: as it is, and rescaled by the folded scales.

    python benchmarks/lora.py lora_on_awq MODEL --text wiki.txt --bits 4 --group-size 32 --out results/lora.json

The model is first quantized (calibrated on the text's beginning). Adapters of all linears are trained on the text after
that, on the float model and on the packed one, from the same draws (``--seeds``) and on the same batches; all are
scored on the text's end. ``lost`` is against the float model with its own adapter. ``--outliers S`` first plants, in a
model that computes the same, outlier channels: every norm's gain is multiplied by S in some channels whose weights are
divided by it, so that activations have them. ``--base-terms``: trains on packed weights also without regard to folded
scales. ``--merge``: the adapter merged into the packed weights, rounded to nearest or quantized anew, calibrated on the
tuning text. ``--corrections``: what ``init="error"`` recovers, untrained, against a plain SVD of the error.
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
from awq_jax.lora import error_init, training
from awq_jax.models.hf.registry import config_from_hf
from awq_jax.models.weights import params as model_params
from awq_jax.qtensor import QuantizedTensor
from awq_jax.serve.model import Model

Apply = Callable[..., jax.Array]


def nll(apply: Apply, adapters: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    """Mean negative log likelihood of each token after the first, in nats."""
    logits = apply(adapters, frozen, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


compiled_nll = jax.jit(nll, static_argnums=0)


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
    parts = [held[i : i + 8] for i in range(0, len(held), 8)]
    return float(np.mean([compiled_nll(apply, adapters, frozen, jnp.asarray(part)) for part in parts]))


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


def merged(packed: Path, adapter: Path, tuning: np.ndarray, held: np.ndarray, **settings: Any) -> running.Row:
    """NLL of the sum rounded and quantized, over that with the adapter beside the packed weights."""
    beside = awq_jax.load(packed, adapter=adapter)
    adapted = beside.adapted().params
    before = score(lambda _, p, x: beside.apply(p, x), jnp.zeros(()), adapted, held)
    out: dict[str, Any] = {"beside": before}
    for name, method in (("rounded", "rtn"), ("quantized", "awq+gptq")):
        model = awq_jax.load(packed, adapter=adapter)
        lora.merge(model)
        model.quantize(tuning, samples=len(tuning), seq_len=tuning.shape[1], progress=False, method=method, **settings)
        out[name] = score(lambda _, p, x, m=model: m.apply(p, x), jnp.zeros(()), model.params, held) - before
    out["ratio"] = out["quantized"] / out["rounded"]
    return out


def lora_on_awq(
    model: str,
    *,
    text: Path,
    bits: int = 4,
    group_size: int = 32,
    rank: int = 16,
    steps: int = 100,
    rows: int = 4,
    length: int = 128,
    held_rows: int = 32,
    rate: float = 1e-3,
    seeds: int = 3,
    outliers: float = 0.0,
    samples: int = 16,
    base_terms: bool = False,
    merge: bool = False,
    corrections: bool = False,
) -> running.Row:
    """All of it on one model."""
    with tempfile.TemporaryDirectory() as work:
        where = {name: Path(work, name) for name in ("float", "packed", "adapter")}
        floats = awq_jax.load(model)
        if outliers:
            planted(floats, outliers)
        floats.save(where["float"])
        need = steps * rows * (length + 1)
        calib, rest = checkpoints.split(floats.tokenizer, text, samples, length, need + held_rows * (length + 1))
        rest = np.asarray(rest[: need + held_rows * (length + 1)], np.int32)
        batches = rest[:need].reshape(steps, rows, length + 1)
        held = rest[need:].reshape(held_rows, length + 1)
        grid: dict[str, Any] = {"bits": bits, "group_size": group_size}
        packed = awq_jax.load(where["float"])
        report = packed.quantize(calib, seq_len=length, progress=False, **grid)
        packed.save(where["packed"], "awq-jax")
        scales = np.concatenate([s.input.reshape(-1) for s in report.scales.values() if s.input is not None])
        out: dict[str, Any] = {**grid, "outliers": outliers, "steps": steps, "rate": rate, "seeds": seeds}
        out["scales"] = [float(scales.min()), float(scales.max())]
        own: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank}
        each: dict[str, list[float]] = {}

        def note(name: str, value: float) -> None:
            each.setdefault(name, []).append(value)

        for seed in range(seeds):
            apply, drawn, params = lora.add(floats, rank=rank, seed=seed)
            trained, seconds = train(apply, drawn, params, batches, rate)
            note("float_step_seconds", seconds)
            note("float_adapter", score(apply, trained, params, held))
            onto, start, frozen = lora.add(packed, rank=rank, seed=seed)
            there, seconds = train(onto, start, frozen, batches, rate)
            note("packed_step_seconds", seconds)
            note("trained_on_packed", score(onto, there, frozen, held))
            if base_terms:
                bare, start, _ = lora.add(packed.apply, packed.params, rank=rank, seed=seed)
                note("trained_in_base_terms", score(bare, train(bare, start, frozen, batches, rate)[0], frozen, held))
            if seed:
                continue
            out["float"], out["packed"] = score(apply, drawn, params, held), score(onto, start, frozen, held)
            lora.save(lora.adapter(floats, trained, base=str(where["float"]), **own), where["adapter"])
            for name, terms in (("as_is", "base"), ("rescaled", "auto")):
                fitted = bases.fitted(files.read(where["adapter"]), bases.of(where["packed"]), terms)
                factors = lora.factors(packed, fitted, **own)
                out[f"{name}_lost"] = score(onto, factors, frozen, held) - each["float_adapter"][0]
        out |= each
        for name in ("trained_on_packed", "trained_in_base_terms"):
            if name in each:
                lost = np.subtract(each[name], each["float_adapter"])
                out[f"{name}_lost"] = float(lost.mean())
                out[f"{name}_lost_error"] = float(lost.std(ddof=1) / len(lost) ** 0.5) if seeds > 1 else None
        out["ratio"] = out["rescaled_lost"] / out["as_is_lost"]
        if merge:
            out["merged"] = merged(
                where["packed"], where["adapter"], batches.reshape(-1, length + 1)[:, :-1], held, **grid
            )
        if corrections:
            out["recovered"] = recovered(floats, packed, report, calib, held, rank)
    return out


def cost(
    *,
    layers: int = 8,
    hidden: int = 1024,
    inner: int = 2816,
    vocab: int = 4096,
    rank: int = 16,
    rows: int = 2,
    length: int = 128,
    steps: int = 3,
) -> running.Row:
    """What a step of `awq-jax finetune` with rematerialized layers costs on packed, float32 and bfloat16 weights.

    Bytes are those of the compiled program; seconds are of this process's processor time, the least of ``steps``.
    """
    out: dict[str, Any] = {"layers": layers, "hidden": hidden, "rank": rank, "tokens": rows * length}
    how = training.Training(rank=rank, batch_size=rows)
    ids = np.random.default_rng(0).integers(0, vocab, (1, rows, length)).astype(np.int32)
    batch = {"ids": jnp.asarray(ids), "counts": jnp.ones(ids.shape)}
    with tempfile.TemporaryDirectory() as work:
        checkpoints.make(Path(work, "m"), layers=layers, hidden=hidden, inner=inner, vocab=vocab, dtype="float32")
        for name, dtype in (("float32", "float32"), ("bfloat16", "bfloat16"), ("packed", "float32")):
            model = awq_jax.load(Path(work, "m"), dtype)
            if name == "packed":
                model.quantize(bits=4, group_size=min(128, hidden), method="rtn", progress=False)
            apply, adapters, frozen = lora.add(model, rank=rank, remat="block")
            optimizer = how.optimizer()
            moments = optimizer.init(adapters)
            plain: Any = training.stepping(apply, optimizer)
            step = plain.lower(adapters, moments, frozen, batch).compile()
            used, seconds = step.memory_analysis(), []
            for _ in range(steps):
                start = time.process_time()
                jax.block_until_ready(step(adapters, moments, frozen, batch))
                seconds.append(time.process_time() - start)
            size = [sum(a.nbytes for a in jax.tree.leaves(tree) if a.ndim) for tree in (adapters, moments)]
            out[name] = {
                "argument_bytes": used.argument_size_in_bytes, "temporary_bytes": used.temp_size_in_bytes,
                "bytes": used.argument_size_in_bytes + used.temp_size_in_bytes, "cpu_seconds": min(seconds),
                "adapter_bytes": size[0], "moment_bytes": size[1],
            }  # fmt: skip
    out["bytes_of_bfloat16"] = out["packed"]["bytes"] / out["bfloat16"]["bytes"]
    out["seconds_of_float32"] = out["packed"]["cpu_seconds"] / out["float32"]["cpu_seconds"]
    return out


def forecast(
    *,
    layers: int = 32,
    hidden: int = 4096,
    inner: int = 11008,
    vocab: int = 32000,
    heads: int = 32,
    rank: int = 16,
    rows: int = 1,
    length: int = 512,
    group_size: int = 128,
) -> running.Row:
    """Bytes of a step on packed weights and bfloat16 activations, from programs compiled here for one and two layers.

    Nothing is allocated but the factors. What a layer adds is taken to be the same for each.
    """

    def compiled(count: int) -> tuple[int, int]:
        hf = {**checkpoints.config(count, hidden, inner, vocab, heads=heads), "max_position_embeddings": length}
        config = config_from_hf(hf)
        graphdef, state = model_params.abstract(config)

        def leaf(path: str, a: Any) -> Any:
            if path.startswith("layers") and path.endswith("/kernel"):
                return unmade(a.shape[0], a.shape[1], group_size)
            return jax.ShapeDtypeStruct(a.shape, jnp.bfloat16)

        nowhere: Any = None
        model = Model(config, dict(hf), graphdef, paths.map_with_path(leaf, state), None, nowhere)
        apply, adapters, frozen = lora.add(model, rank=rank, remat="block")
        optimizer = training.Training(rank=rank).optimizer()
        moments = jax.eval_shape(optimizer.init, adapters)
        shape = (1, rows, length)
        batch = {"ids": jax.ShapeDtypeStruct(shape, jnp.int32), "counts": jax.ShapeDtypeStruct(shape, jnp.float32)}
        step: Any = training.stepping(apply, optimizer)
        used = step.lower(adapters, moments, frozen, batch).compile().memory_analysis()
        return used.argument_size_in_bytes, used.temp_size_in_bytes

    one, two = compiled(1), compiled(2)
    arguments, temporaries = (a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return {
        "layers": layers, "hidden": hidden, "inner": inner, "vocab": vocab, "rank": rank, "tokens": rows * length,
        "one_layer": one, "two_layers": two, "argument_bytes": arguments, "temporary_bytes": temporaries,
        "gib": (arguments + temporaries) / 2**30,
    }  # fmt: skip


def unmade(k: int, n: int, group_size: int) -> QuantizedTensor:
    """A packed weight of 4 bits without its numbers."""
    of = jax.ShapeDtypeStruct
    table = (k // group_size, n)
    tables: dict[str, Any] = {
        "qweight": of((k // 8, n), jnp.uint32), "scales": of(table, jnp.float16), "zeros": of(table, jnp.uint8),
    }  # fmt: skip
    return QuantizedTensor(
        **tables, inv_scale=None, bits=4, group_size=group_size, axes="kn", k_dims=(k,), n_dims=(n,), dtype="bfloat16"
    )


def smoke(directory: Path) -> Iterator[list[str]]:
    model, _ = checkpoints.tiny(directory)
    text = checkpoints.token_file(directory / "model", directory, 16, 16)
    quick = ["--rank", "2", "--steps", "2", "--rows", "2", "--length", "8", "--held-rows", "8", "--samples", "4"]
    more = ["--seeds", "1", "--outliers", "4", "--corrections", "--merge", "--base-terms"]
    yield ["cost", "--layers", "1", "--hidden", "64", "--inner", "64", "--vocab", "64", "--length", "8", "--steps", "1"]
    yield [
        "lora_on_awq",
        model,
        "--text",
        str(text),
        "--group-size",
        "32",
        *quick,
        *more,
        "--out",
        str(directory / "r.json"),
    ]


main = functools.partial(running.run, (lora_on_awq, cost, forecast), smoke)

if __name__ == "__main__":
    main()
