"""llm-awq: its second layout, and its search results read without unpickling and applied."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from awq_files import fast_words, make, read, same, save, write
from safetensors.numpy import load_file, save_file
from transformers import AwqConfig as TransformersConfig

import awq_jax
from awq_jax import convert
from awq_jax.cli import main
from awq_jax.convert import folded_scales, pipeline, registry
from awq_jax.convert.arrays import codes
from awq_jax.convert.files import manifest, torch_zip
from awq_jax.convert.formats.awq import search_results
from awq_jax.errors import AwqError, CheckpointError, FormatError, WeightError

FIXTURES = Path(__file__).parent / "fixtures"
NAME = "model.layers.0.mlp.up_proj.weight"


def layout_arrays(k: int, n: int, group: int, rows: int, dtype: Any = np.float16) -> tuple[dict[str, Any], np.ndarray]:
    """What llm-awq's ``WQLinear.from_linear`` stores, made here, and the weight it stands for."""
    rng = np.random.default_rng(k + n)
    w, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    s = rng.uniform(0.01, 1, z.shape).astype(dtype)
    sz = (-(s.astype(np.float32) * z.astype(np.float32))).astype(dtype)
    padding = ((0, rows - k // group), (0, 0))
    arrays = {"qweight": fast_words(w), "scales": np.pad(s, padding), "scaled_zeros": np.pad(sz, padding)}
    wide = [np.repeat(a.astype(np.float64), group, 0) for a in (s, sz)]
    return arrays, w * wide[0] + wide[1]


@pytest.mark.parametrize(("k", "group", "rows"), [(1024, 128, 8), (1152, 128, 16), (256, 64, 16), (192, 32, 32)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_second_layout(tmp_path: Path, k: int, group: int, rows: int, dtype: Any) -> None:
    arrays, want = layout_arrays(k, 16, group, rows, dtype)
    directory = save(
        tmp_path / "in",
        {f"a.{p}": a for p, a in arrays.items()},
        {"group_size": group, "version": "gemm", "backend": "llm-awq", "zero_point": True},
    )
    source = registry.open_source(directory)
    assert source.format == "llm-awq"
    assert source.info("a.weight").packed.offsets
    q = read(directory, "a.weight")
    np.testing.assert_array_equal(codes.dequantize(q, np.float64), want)
    result = convert.checkpoint(directory, tmp_path / "out", "llm-awq")
    assert not result.inexact
    out = load_file(tmp_path / "out/model.safetensors")
    assert {p: (a.dtype, a.tobytes()) for p, a in out.items()} == {
        f"a.{p}": (a.dtype, a.tobytes()) for p, a in arrays.items()
    }


def test_config_as_transformers_knows_it(tmp_path: Path) -> None:
    directory = write(tmp_path / "out", {NAME: make(128, 16, 64, form="offsets")}, "llm-awq", allow_lossy=True)
    quant = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert TransformersConfig(**quant).format == "llm-awq"
    assert registry.open_source(directory).format == "llm-awq"


def test_autoawqs_gemv_fast_is_the_same_layout(tmp_path: Path) -> None:
    fast = FIXTURES / "autoawq-gemvfast"
    result = convert.checkpoint(fast, tmp_path / "llm", "llm-awq")
    assert not result.inexact
    theirs, ours = load_file(fast / "model.safetensors"), load_file(tmp_path / "llm/model.safetensors")
    assert {k.replace("qzeros", "scaled_zeros"): v.tobytes() for k, v in theirs.items()} == {
        k: v.tobytes() for k, v in ours.items()
    }
    convert.checkpoint(tmp_path / "llm", tmp_path / "back", "gemv_fast")
    back = load_file(tmp_path / "back/model.safetensors")
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in theirs.items()}


def test_group_size_from_the_shapes(tmp_path: Path) -> None:
    """llm-awq takes it on the command line; its files do not say."""
    arrays, want = layout_arrays(2048, 16, 128, 16)
    small, _ = layout_arrays(128, 8, 128, 8)
    named = {f"a.{p}": a for p, a in arrays.items()} | {f"b.{p}": a for p, a in small.items()}
    directory = save(tmp_path / "in", named, None)
    np.testing.assert_array_equal(codes.dequantize(read(directory, "a.weight"), np.float64), want)
    odd = {"a.qweight": arrays["qweight"], "a.scales": arrays["scales"][:5], "a.scaled_zeros": arrays["scales"][:5]}
    with pytest.raises(FormatError, match=r"group size cannot be told.*quantization_config"):
        registry.open_source(save(tmp_path / "odd", odd, None))
    lost = {k: v for k, v in named.items() if k != "a.qweight"}
    with pytest.raises(CheckpointError, match=r"a.qweight"):
        registry.open_source(save(tmp_path / "lost", lost, None))


def test_bfloat16_is_kept_only_if_zeros_have_it() -> None:
    """Rounding -s * z to bfloat16 would cost more than float16 does."""
    encoder = registry.get("llm-awq").encoder
    assert encoder is not None
    q = make(128, 16, 64, dtype=ml_dtypes.bfloat16)
    encoded = pipeline.encode(encoder(awq_jax.convert.format.Destination()), NAME, q, True)
    assert encoded.arrays[NAME.replace("weight", "scales")].dtype == np.float16
    assert encoded.record.deviation < 0.0074


# Search results


class Block(torch.nn.Module):
    """Layers as llm-awq knows them: a norm before two linears, a linear before a linear, biases, a fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.gate = torch.nn.Linear(32, 64)
        self.up = torch.nn.Linear(32, 64, bias=False)
        self.down = torch.nn.Linear(64, 32)
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32, bias=False)


class Tiny(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([Block(), Block()])
        for p in self.parameters():
            p.data.normal_()
        self.to(dtype)


def random_search(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 + 0.2).to(dtype)

    scale: list[Any] = []
    clip: list[Any] = []
    for i in range(2):
        p = f"model.layers.{i}."
        scale.append((p + "norm", (p + "gate", p + "up"), random(32)))
        scale.append((p + "up", (p + "down",), random(64)))
        scale.append((p + "qkv", (p + "out",), random(32)))
        for name, n, k in (("gate", 64, 32), ("down", 32, 64), ("qkv", 96, 32)):
            clip.append((p + name, random(n, k // 16, 1) * 0.2))
    return {"scale": scale, "clip": clip}


def apply_awq(model: Tiny, search: dict[str, Any]) -> dict[str, torch.Tensor]:
    """llm-awq's procedure in torch: fold every scale in place, then clamp by group."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for before, layers, scales in search["scale"]:
            weight, bias = params[before + ".weight"], params.get(before + ".bias")
            s = scales.to(weight.dtype)
            if weight.ndim == 1:
                weight.div_(s)
            else:
                weight[-len(s) :].div_(s.view(-1, 1))
            if bias is not None:
                bias[-len(s) :].div_(s)
            for layer in layers:
                params[layer + ".weight"].mul_(s.view(1, -1))
        for name, bound in search["clip"]:
            weight = params[name + ".weight"]
            bound = bound.to(weight.dtype)
            weight.copy_(torch.clamp(weight.reshape(*bound.shape[:2], -1), -bound, bound).reshape(weight.shape))
    return {k: v.detach() for k, v in params.items()}


def numpy_of(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def float_checkpoint(directory: Path, model: Tiny, prefix: str = "") -> Path:
    directory.mkdir()
    arrays = {k.removeprefix(prefix): numpy_of(v.detach().clone()) for k, v in model.named_parameters()}
    save_file(arrays, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_search_applied_as_llm_awq_does(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    """Bit for bit, also where scales are searched in another dtype, and with names saved without a head."""
    model, search = Tiny(dtype), random_search(torch.float32)
    directory = float_checkpoint(tmp_path / "float", model, prefix)
    torch.save(search, tmp_path / "search.pt")
    source = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    want = {k.removeprefix(prefix): numpy_of(v) for k, v in apply_awq(model, search).items()}
    assert source.names() == sorted(want)
    before = load_file(directory / "model.safetensors")
    for name, array in want.items():
        got = source.read(name)
        assert (got.dtype, got.shape) == (array.dtype, source.shape(name))
        assert np.asarray(got).tobytes() == array.tobytes(), name
        assert (before[name].tobytes() == array.tobytes()) == name.endswith(("gate.bias", "down.bias"))
    convert.checkpoint(source, tmp_path / "out", "float")
    out = load_file(tmp_path / "out/model.safetensors")
    assert {k: v.tobytes() for k, v in out.items()} == {k: v.tobytes() for k, v in want.items()}
    assert (tmp_path / "out/tokenizer.json").exists()


def test_folding_leaves_the_function_as_it_is(tmp_path: Path) -> None:
    """Without clipping: norm, products and the linear after them give the same, in float64 of float32 weights."""
    model, search = Tiny(torch.float32), random_search(torch.float32)
    directory = float_checkpoint(tmp_path / "float", model)
    torch.save({**search, "clip": []}, tmp_path / "search.pt")
    source = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    x = np.random.default_rng(0).normal(size=(5, 32))

    def run(get: Callable[[str], Any]) -> np.ndarray:
        w = {n: np.asarray(get(f"model.layers.0.{n}"), np.float64) for n in names}
        h = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * w["norm.weight"] + w["norm.bias"]
        gate, up = h @ w["gate.weight"].T + w["gate.bias"], h @ w["up.weight"].T
        return (np.tanh(gate) * up) @ w["down.weight"].T

    names = ["norm.weight", "norm.bias", "gate.weight", "gate.bias", "up.weight", "down.weight"]
    np.testing.assert_allclose(run(source.read), run(source.source.read), rtol=1e-5, atol=1e-6)


def test_scales_are_kept_for_adapters(tmp_path: Path) -> None:
    """As llm-awq's files have them; what they say is what became of the weights."""
    directory = float_checkpoint(tmp_path / "float", Tiny(torch.float32))
    torch.save({**random_search(torch.float32), "clip": []}, tmp_path / "search.pt")
    given = ["convert", str(directory), str(tmp_path / "out"), "--to", "float", "--search", str(tmp_path / "search.pt")]
    assert main(given) == 0
    kept, before, after = (
        folded_scales.of(tmp_path / "out"),
        *(load_file(tmp_path / name / "model.safetensors") for name in ("float", "out")),
    )
    modules = {f"model.layers.{i}.{name}" for i in range(2) for name in ("gate", "up", "down", "qkv", "out")}
    assert kept is not None
    assert kept.keys() == modules
    for module, (s, t) in kept.items():
        want = before[f"{module}.weight"].astype(np.float64) * (1 if s is None else s)
        want = want / (1 if t is None else t[:, None])
        np.testing.assert_allclose(after[f"{module}.weight"], want, rtol=1e-6)
    assert kept["model.layers.0.up"].input is not None
    assert kept["model.layers.0.up"].output is not None


def test_norms_that_add_one(tmp_path: Path) -> None:
    model, search = Tiny(torch.float32), random_search(torch.float32)
    directory = float_checkpoint(tmp_path / "float", model)
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    torch.save(search, tmp_path / "search.pt")
    got = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt").read(
        "model.layers.1.norm.weight"
    )
    s = search["scale"][3][2].double().numpy()
    weight = dict(model.named_parameters())["model.layers.1.norm.weight"].detach().double().numpy()
    np.testing.assert_allclose(np.asarray(got), (1 + weight) / s - 1, rtol=1e-6, atol=1e-6)


def test_quantized_afterwards(tmp_path: Path) -> None:
    """The use it is for: fold and clip, then round to nearest."""
    directory = float_checkpoint(tmp_path / "float", Tiny(torch.float32))
    torch.save(random_search(torch.float32), tmp_path / "search.pt")
    source = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    name = "model.layers.0.gate.weight"
    w = np.asarray(source.read(name), np.float64)
    grouped = w.reshape(64, 2, 16)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.rint(-low / scales).astype(np.uint8)
    q = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8).reshape(64, 32)
    packed = awq_jax.convert.arrays.linear.build(codes.pack(q.T, 4), scales.T, zeros.T, 4, 16, 32, 64, "float32")
    rest = {n: source.read(n) for n in source.names() if n != name}
    back = read(write(tmp_path / "gemm", {name: packed, **rest}, "gemm"), name)
    assert same(back, packed)
    assert np.abs(codes.dequantize(back).T - w).max() <= scales.max() * 0.51


def test_from_the_command_line(tmp_path: Path) -> None:
    from awq_jax import cli

    search = random_search(torch.float32)
    torch.save(search, tmp_path / "search.pt")
    directory = float_checkpoint(tmp_path / "src", Tiny(torch.float32))
    want = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    arguments = ["--to", "float", "--search", str(tmp_path / "search.pt"), "--quiet"]
    assert cli.main(["convert", str(directory), str(tmp_path / "out"), *arguments]) == 0
    got = registry.open_source(tmp_path / "out")
    for name in want.names():
        np.testing.assert_array_equal(got.read(name), want.read(name))


def test_a_resumed_conversion_knows_its_search(tmp_path: Path) -> None:
    directory = float_checkpoint(tmp_path / "float", Tiny(torch.float32))
    sources = [registry.open_source(directory)]
    for i in range(2):
        search = random_search(torch.float32)
        search["clip"] = search["clip"][i:]
        torch.save(search, tmp_path / f"{i}.pt")
        sources.append(convert.apply_search(sources[0], tmp_path / f"{i}.pt"))
    assert len({manifest.fingerprint(s, to="float") for s in sources}) == 3


def with_entry(part: str, entry: Any) -> dict[str, Any]:
    search = random_search(torch.float32)
    search[part] = [*search[part], entry]
    return search


L0 = "model.layers.0."
WRONG: list[tuple[Any, type[AwqError], str]] = [
    ([1, 2], FormatError, "not a search result"),
    ({"scale": []}, FormatError, "not a search result"),
    ({"scale": {}, "clip": []}, FormatError, '"scale" is not what llm-awq writes'),
    (with_entry("scale", (L0 + "norm", "gate", torch.ones(32))), FormatError, '"scale" is not'),
    (with_entry("scale", (L0 + "norm", (L0 + "gate",))), FormatError, '"scale" is not'),
    (with_entry("scale", (L0 + "norm", (L0 + "gate",), 2.0)), FormatError, '"scale" is not'),
    (with_entry("scale", (L0 + "norm", (L0 + "gate",), torch.ones(31))), FormatError, "norm.weight.*against 31 scales"),
    (with_entry("scale", (L0 + "norm", (L0 + "down",), torch.ones(32))), FormatError, "down.weight.*against 32 scales"),
    (with_entry("scale", (L0 + "norm", (L0 + "norm",), torch.ones(32))), FormatError, "norm.weight.*against a linear"),
    (with_entry("scale", (L0 + "norm", (L0 + "gate",), torch.zeros(32))), WeightError, "after model.layers.0.norm"),
    (with_entry("scale", (L0 + "norm", (L0 + "gate",), torch.ones(32) / 0)), WeightError, "positive and finite"),
    (with_entry("scale", (L0 + "act", (L0 + "down",), torch.ones(64))), FormatError, "scales the activation .*0.act"),
    (with_entry("scale", (L0 + "other", (L0 + "down",), torch.ones(64))), FormatError, "names model.layers.0.other"),
    (with_entry("clip", (L0 + "gate", torch.ones(63, 2, 1))), FormatError, r"gate.weight \(64, 32\) against bounds"),
    (with_entry("clip", (L0 + "gate", torch.ones(64, 3, 1))), FormatError, r"against bounds \(64, 3\)"),
    (with_entry("clip", (L0 + "gate", torch.ones(64, 0, 1))), FormatError, r"against bounds \(64, 0\)"),
    (with_entry("clip", (L0 + "gate", torch.ones(64, 2, 2))), FormatError, '"clip" is not'),
    (with_entry("clip", (L0 + "gate", -torch.ones(64, 2, 1))), WeightError, "bounds of model.layers.0.gate"),
]


@pytest.mark.parametrize(("search", "error", "message"), WRONG)
def test_search_results_that_do_not_fit(tmp_path: Path, search: Any, error: type[AwqError], message: str) -> None:
    directory = float_checkpoint(tmp_path / "float", Tiny(torch.float32))
    torch.save(search, tmp_path / "search.pt")
    with pytest.raises(error, match=message):
        convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")


def test_search_on_what_is_not_float(tmp_path: Path) -> None:
    directory = write(tmp_path / "gemm", {"model.layers.0.gate.weight": make(32, 64, 32)}, "gemm")
    torch.save({"scale": [], "clip": [(L0 + "gate", torch.ones(64, 2, 1))]}, tmp_path / "search.pt")
    with pytest.raises(FormatError, match=r"float weights, but .*gate.weight is packed"):
        convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file({"a": np.ones(3, np.float32)}, directory / "model.safetensors")
    with pytest.raises(FormatError, match="linears of gpt2 are stored transposed"):
        convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")


def test_scales_too_large_for_the_weights(tmp_path: Path) -> None:
    directory = float_checkpoint(tmp_path / "float", Tiny(torch.float16))
    torch.save(with_entry("scale", (L0 + "norm", (L0 + "gate",), torch.full((32,), 1e9))), tmp_path / "search.pt")
    source = convert.apply_search(registry.open_source(directory), tmp_path / "search.pt")
    with pytest.raises(WeightError, match=r"gate.weight overflows float16"):
        source.read("model.layers.0.gate.weight")


# The reader of .pt files


def test_objects_of_tensors(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    value = {
        "view": base.t()[1:, ::2],
        "same": base,
        "half": base.half(),
        "brain": base.bfloat16(),
        "double": base.double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "plain": [1, -2, 2**40, 0.5, None, True, "text", (), (1,), (1, 2), (1, 2, 3, 4)],
        "ordered": collections.OrderedDict(a=[], b={}),
    }
    torch.save(value, tmp_path / "x.pt")
    got = torch_zip.load(tmp_path / "x.pt")
    assert got.keys() == value.keys()
    for name, want in value.items():
        if isinstance(want, torch.Tensor):
            array = numpy_of(want.contiguous())
            assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
            assert got[name].tobytes() == array.tobytes()
        else:
            assert got[name] == want


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, data: bytes, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", data)
        for name, content in files.items():
            z.writestr(f"archive/data/{name}", content)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    "call", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (exec, "open({!r}, 'w')"), (Path.touch, Path("{}"))]
)
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int, call: Any) -> None:
    marker = tmp_path / "executed"
    function, argument = call
    argument = marker if isinstance(argument, Path) else argument.format(str(marker))
    data = pickle.dumps({"scale": [Evil(function, argument)], "clip": []}, protocol)
    path = archive(tmp_path / "evil.pt", data)
    with pytest.raises(FormatError, match="is a pickle"):
        search_results.read_search(path)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # the attack is real


def test_attacks_on_what_is_allowed(tmp_path: Path) -> None:
    """Allowed names in calls they are not meant for, and instructions that plain tensors do not need."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    ordered = b"ccollections\nOrderedDict\n"
    attacks = {
        "state": ordered + b")R}(X\x01\x00\x00\x00aK\x01ub.",  # BUILD
        "attribute": tensor + b"}(X\x0c\x00\x00\x00__defaults__Nub.",
        "instance": b"(icollections\nOrderedDict\n.",
        "object": b"(" + ordered + b"o.",
        "new": ordered + b")\x81.",
        "extension": b"\x82\x01.",
        "arguments": ordered + b"(K\x01K\x02tR.",
        "not a call": b"K\x01)R.",
        "storage called": b"ctorch\nFloatStorage\nK\x05\x85R.",
        "bytes": b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "string": b"X\xff\xff\xff\x7fa.",
        "memo": b"Nr\xff\xff\xff\x7f0.",
        "empty stack": b".",
        "no mark": b"t.",
        "no end": b"N",
        "missing memo": b"h\x07.",
        "keys": b"}(K\x01K\x02u.",
        "odd items": b"}(X\x01\x00\x00\x00au.",
        "append to none": b"NNa.",
        "persistent": b"NQ.",
        "no tensor": tensor + b")R.",
        "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        "deep": b"(" * 100_000 + b"t" * 100_000 + b".",
    }
    for name, data in attacks.items():
        path = archive(tmp_path / "x.pt", data)
        if name == "deep":
            with pytest.raises(AwqError):
                search_results.read_search(path)
            continue
        with pytest.raises(AwqError):
            torch_zip.load(path)


def tensor_pickle(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, size: int = 6, key: str = "0"
) -> bytes:
    """The pickle of one float32 tensor with these numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", size) if isinstance(value, Storage) else None

    class Storage: ...

    class Tensor:
        def __reduce__(self) -> Any:
            arguments: Any = (Storage(), offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(Tensor())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"shape": (7,), "strides": (1,)}, "exceeds its storage"),
        ({"shape": (2, 3), "strides": (4, 1)}, "exceeds its storage"),
        ({"shape": (3,), "strides": (1,), "offset": 4}, "exceeds its storage"),
        ({"shape": (2**40,), "strides": (0,)}, "exceeds its storage"),
        ({"shape": (2**47, 2**47), "strides": (0, 0)}, "exceeds its storage"),
        ({"shape": (-1,), "strides": (1,)}, "impossible shape"),
        ({"shape": (2,), "strides": (-1,), "offset": 3}, "impossible shape"),
        ({"shape": (2,), "strides": (1, 1)}, "impossible shape"),
        ({"shape": (True,), "strides": (1,)}, "impossible shape"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "impossible shape"),
        ({"shape": (6,), "strides": (1,), "size": 7}, "has 24 bytes; 7 numbers"),
        ({"shape": (6,), "strides": (1,), "size": 2**47}, "has 24 bytes"),
        ({"shape": (6,), "strides": (1,), "key": "1"}, "lacks archive/data/1"),
        ({"shape": (6,), "strides": (1,), "key": "../data.pkl"}, "damaged"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, numbers: dict[str, Any], message: str) -> None:
    numbers_file = {"0": np.arange(6, dtype=np.float32).tobytes()}
    good = torch_zip.load(archive(tmp_path / "good.pt", tensor_pickle((2, 3), (3, 1)), **numbers_file))
    np.testing.assert_array_equal(good, np.arange(6).reshape(2, 3))
    with pytest.raises(CheckpointError, match=message):
        torch_zip.load(archive(tmp_path / "bad.pt", tensor_pickle(**numbers), **numbers_file))


def test_archives_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="cannot read"):
        torch_zip.load(path)
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(CheckpointError, match=r"not a \.pt file"):
        torch_zip.load(path)
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before 1\.6"):
        torch_zip.load(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("readme", "x")
    with pytest.raises(FormatError, match="no object"):
        torch_zip.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"N" * 10_000_000)
    with pytest.raises(FormatError, match="compressed or too large"):
        torch_zip.load(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"N.")
        z.writestr("archive/byteorder", "big")
    with pytest.raises(FormatError, match="big-endian"):
        torch_zip.load(path)


def test_mutated_files(tmp_path: Path) -> None:
    """Bytes changed anywhere give a typed error or a result of the same size."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pt"
    torch.save({"scale": [("a", ("b",), torch.ones(8))], "clip": [("b", torch.ones(4, 2, 1))]}, path)
    good = path.read_bytes()
    outcomes = collections.Counter[bool]()
    for _ in range(400):
        data = bytearray(good)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.1 else data)
        try:
            result = search_results.read_search(path)
            outcomes[True] += 1
            assert sum(s.nbytes for _, _, s in result.scale) <= len(good)
        except AwqError:
            outcomes[False] += 1
    assert min(outcomes[True], outcomes[False]) > 5


def test_torch_is_not_imported() -> None:
    modules = ("convert.files.torch_zip", "convert.formats.awq.search_results")
    imports = "; ".join(f"import awq_jax.{m}" for m in modules)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
