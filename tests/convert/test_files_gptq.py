"""GPTQ, v1 and v2: against GPTQModel's own files and a bit-by-bit reference."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax import QuantizedTensor
from awq_jax.convert import conversion, registry, writing
from awq_jax.convert.arrays import codes, linear
from awq_jax.convert.formats import gptq, gptq_config
from awq_jax.errors import CheckpointError, FormatError, WeightError

FIXTURES = Path(__file__).parent / "fixtures"
PEERS = os.environ.get("AWQ_JAX_FIXTURES", "")
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
NAME = "model.layers.0.mlp.up_proj"
SHAPES = [(64, 32, 16), (96, 64, 32), (160, 32, 160)]  # K, N, group
FORMATS = {"gptq": "gptq", "gptq-v2": "gptq_v2"}


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """``[count, M]`` codes to int32 ``[W, M]``: each column one big integer, lowest bits first."""
    columns = []
    for column in values.T:
        whole = sum(int(v) << (i * bits) for i, v in enumerate(column))
        columns.append([(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(column) * bits // 32))])
    return np.array(columns, np.uint32).T.copy().view(np.int32)


@dataclasses.dataclass
class Module:
    """One linear by the numbers: codes ``[K, N]``, scales and zero points ``[K/g, N]``, groups ``[K]``."""

    q: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    index: np.ndarray
    bits: int

    def weight(self) -> np.ndarray:
        """float64 ``[N, K]``, one value at a time."""
        k, n = self.q.shape
        out = np.empty((n, k))
        for j in range(k):
            g = self.index[j]
            for i in range(n):
                out[i, j] = (int(self.q[j, i]) - int(self.zeros[g, i])) * float(self.scales[g, i])
        return out

    def arrays(self, format: str) -> dict[str, np.ndarray]:
        stored = self.zeros - (1 if format == "gptq" else 0)
        return {
            "qweight": stream(self.q, self.bits),
            "qzeros": np.ascontiguousarray(stream(stored.T, self.bits).T),
            "scales": self.scales,
            "g_idx": self.index,
        }


def module(k: int, n: int, group: int, bits: int = 4, *, symmetric: bool = False, order: bool = False) -> Module:
    rng = np.random.default_rng([k, n, bits])
    groups = k // group
    index = np.repeat(np.arange(groups, dtype=np.int32), group)
    zeros = np.full((groups, n), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (groups, n))
    return Module(
        rng.integers(0, 2**bits, (k, n)),
        (rng.uniform(0.001, 0.1, (groups, n)) * rng.choice([-1, 1], (groups, n))).astype(np.float16),
        zeros,
        rng.permutation(index) if order else index,
        bits,
    )


def settings(format: str, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False,
        "checkpoint_format": FORMATS[format],
    } | changes  # fmt: skip


def store(directory: Path, tensors: dict[str, Any], quant: dict[str, Any] | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")
    config = CONFIG if quant is None else CONFIG | {"quantization_config": quant}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def saved(directory: Path, m: Module, format: str = "gptq-v2", parts: Any = None, **changes: Any) -> Path:
    """A checkpoint of one linear; ``parts`` replace tensors, None drops them."""
    arrays = m.arrays(format) | (parts or {})
    quant = settings(format, bits=m.bits, group_size=len(m.q) // len(m.scales), **changes)
    return store(directory, {f"{NAME}.{p}": a for p, a in arrays.items()}, quant)


def read(directory: Path, name: str = NAME) -> QuantizedTensor:
    source = registry.open_source(directory)
    q = source.read(f"{name}.weight")
    assert isinstance(q, QuantizedTensor)
    info = source.info(f"{name}.weight")
    assert (info.packed.bits, info.packed.group_size, info.packed.act_order) == (
        q.bits,
        q.group_size,
        q.perm is not None,
    )
    assert info.shape == q.shape
    return q


def write(directory: Path, tensors: dict[str, Any], format: str = "gptq-v2", **options: Any) -> Path:
    writing.write_checkpoint(directory, list(tensors.items()), CONFIG, format, **options)
    return directory


def canonical(k: int, n: int, group: int, bits: int = 4, **changes: Any) -> QuantizedTensor:
    rng = np.random.default_rng([k, n, bits])
    scales = rng.uniform(0.001, 0.1, (k // group, n)).astype(np.float16)
    zeros = rng.integers(1, 2**bits, scales.shape).astype(np.uint8)
    packed = codes.pack(rng.integers(0, 2**bits, (k, n)).astype(np.uint8), bits)
    return dataclasses.replace(linear.build(packed, scales, zeros, bits, group, k, n, "float32"), **changes)


@pytest.mark.parametrize("format", FORMATS)
def test_gptqmodels_own_files(tmp_path: Path, format: str) -> None:
    """Read as GPTQModel dequantizes them, and written back byte for byte."""
    directory = FIXTURES / ("gptqmodel-gptq-v1" if format == "gptq" else "gptqmodel-gptq-v2")
    source = registry.open_source(directory)
    assert source.format == format
    dense = np.load(directory / "dense.npz")
    assert set(source.names()) == {*dense.files, "model.norm.weight"}
    for weight in dense.files:
        assert np.abs(codes.dequantize(source.read(weight)).T - dense[weight]).max() == 0
    conversion.checkpoint(directory, tmp_path / "out", format)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(directory / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (array.dtype, array.shape), key
        assert ours[key].tobytes() == array.tobytes(), key


@pytest.mark.skipif(not PEERS, reason="AWQ_JAX_FIXTURES is not set")
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("gptqm-gptq-v1-b8-g64-llama", "gptq"),
        ("gptqm-gptq-v1-g64-llama", "gptq"),
        ("gptqm-gptq-v2-g64-llama", "gptq-v2"),
        ("gptqm-awq-gemm-asym-g64-llama", "gemm"),
    ],
)
def test_whole_checkpoints_of_gptqmodel(name: str, format: str) -> None:
    source = registry.open_source(Path(PEERS) / name)
    assert source.format == format
    dense = load_file(Path(PEERS) / name / "dense.safetensors")
    packed = [n for n in source.names() if isinstance(source.read(n), QuantizedTensor)]
    assert len(packed) == 14
    for weight in packed:
        assert np.abs(codes.dequantize(source.read(weight)).T - dense[weight]).max() == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", gptq_config.BITS)
@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "act-order"])
def test_read_and_written_as_the_reference_has_it(tmp_path: Path, format: str, bits: int, form: str) -> None:
    for i, (k, n, group) in enumerate(SHAPES):
        m = module(k, n, group, bits, symmetric=form == "symmetric", order=form == "act-order")
        if format == "gptq-v2" and form == "asymmetric":
            m.zeros[0, :4] = 0
        options = {"sym": form == "symmetric", "desc_act": form == "act-order"}
        q = read(saved(tmp_path / f"{i}", m, format, **options))
        np.testing.assert_array_equal(codes.dequantize(q, np.float64).T, m.weight())
        assert q.symmetric == (form == "symmetric")
        assert q.perm is None or (np.diff(np.asarray(q.perm).reshape(-1, group)) > 0).all()
        dst = write(tmp_path / f"{i}-again", {f"{NAME}.weight": q}, format)
        again = load_file(dst / "model.safetensors")
        for part, array in m.arrays(format).items():
            written = again[f"{NAME}.{part}"]
            assert (written.dtype, written.shape) == (array.dtype, array.shape), part
            assert written.tobytes() == array.tobytes(), part
        quant = json.loads((dst / "config.json").read_text())["quantization_config"]
        act_order = form == "act-order" and group < k
        assert (quant["bits"], quant["group_size"], quant["sym"], quant["desc_act"]) == (
            bits, group, options["sym"], act_order,
        )  # fmt: skip


def test_v1_zero_points_of_zero_are_read_as_their_writer_means_them(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from every field of a word at once; others from each field, dropping the borrow."""
    zeros = np.array([[0, 1, 15, 0, 0, 7, 8, 0] * 4], np.uint8)
    for bits, z in ((4, zeros), (2, zeros & 3), (8, zeros)):
        fields = [int(sum(int(v) << (bits * i) for i, v in enumerate(w))) for w in z.reshape(-1, 32 // bits)]
        ones = sum(1 << i for i in range(0, 32, bits))
        theirs = np.array([(f - ones) & 0xFFFFFFFF for f in fields], np.uint32).view(np.int32)[None]
        np.testing.assert_array_equal(gptq.unpack_qzeros(theirs, bits, 32, v1=True, carries=True), z)
        each = (z.astype(int) - 1) % 2**bits
        np.testing.assert_array_equal(gptq.unpack_qzeros(stream(each.T, bits).T, bits, 32, v1=True, carries=False), z)
    each = stream((zeros.T.astype(int) % 8 - 1) % 8, 3).T
    np.testing.assert_array_equal(gptq.unpack_qzeros(each, 3, 32, v1=True, carries=True), zeros % 8)

    m = module(64, 32, 16)
    m.zeros[:] = zeros
    words = np.ascontiguousarray(stream(m.zeros.T, 4).T).view(np.uint32) - np.uint32(0x11111111)
    path = saved(tmp_path, m, "gptq", {"qzeros": words.view(np.int32)}, meta={"quantizer": ["gptqmodel:7.7.0"]})
    np.testing.assert_array_equal(codes.dequantize(read(path), np.float64).T, m.weight())


def test_v1_is_not_written_with_zero_points_of_zero(tmp_path: Path) -> None:
    q = canonical(64, 32, 16)
    q.zeros[1, 3] = 0
    with pytest.raises(FormatError, match=r"up_proj.*zero points 0.*convert to 'gptq-v2'"):
        write(tmp_path / "out", {f"{NAME}.weight": q}, "gptq")
    back = read(write(tmp_path / "out", {f"{NAME}.weight": q}, "gptq-v2"))
    np.testing.assert_array_equal(back.zeros, q.zeros)


def test_without_g_idx_and_with_whole_columns(tmp_path: Path) -> None:
    m = module(64, 32, 16)
    q = read(saved(tmp_path / "a", m, parts={"g_idx": None}))
    np.testing.assert_array_equal(codes.dequantize(q, np.float64).T, m.weight())
    m = module(64, 32, 64, 3)
    for i, parts in enumerate(({}, {"g_idx": None})):
        arrays = {f"{NAME}.{p}": a for p, a in (m.arrays("gptq") | parts).items()}
        q = read(store(tmp_path / f"{i}", arrays, settings("gptq", bits=3, group_size=-1)))
        assert q.group_size == 64
        np.testing.assert_array_equal(codes.dequantize(q, np.float64).T, m.weight())
    weights = {"m.0.a.weight": canonical(32, 32, 32), "m.0.b.weight": canonical(64, 32, 64)}
    dst = write(tmp_path / "out", weights, "gptq")
    assert json.loads((dst / "config.json").read_text())["quantization_config"]["group_size"] == -1
    for name, q in weights.items():
        np.testing.assert_array_equal(read(dst, name.removesuffix(".weight")).qweight, q.qweight)


def test_symmetric_by_config_only(tmp_path: Path) -> None:
    """Neither the config nor the zero points can be trusted then; see test_symmetric.py."""
    with pytest.raises(FormatError, match=r"up_proj\.qzeros holds .*sym true"):
        read(saved(tmp_path, module(64, 32, 16), "gptq", sym=True))


def test_scales_of_other_types(tmp_path: Path) -> None:
    m = module(64, 32, 16)
    m.scales = m.scales.astype(ml_dtypes.bfloat16)
    q = read(saved(tmp_path / "a", m))
    assert q.scales.dtype == ml_dtypes.bfloat16
    dst = write(tmp_path / "b", {f"{NAME}.weight": q})  # these are exact in float16
    assert load_file(dst / "model.safetensors")[f"{NAME}.scales"].dtype == np.float16
    np.testing.assert_array_equal(codes.dequantize(read(dst)), codes.dequantize(q))
    fine = canonical(64, 32, 16, scales=np.full((4, 32), 0.1, np.float32))
    with pytest.raises(FormatError, match=r"up_proj.*not held exactly"):
        write(tmp_path / "c", {f"{NAME}.weight": fine})


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """AutoGPTQ's first checkpoints: quantize_config.json, and nothing in config.json."""
    m = module(64, 32, 16, 3, order=True)
    store(tmp_path, {f"{NAME}.{p}": a for p, a in m.arrays("gptq").items()}, None)
    old = {"bits": 3, "group_size": 16, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old | {"model_name_or_path": None}))
    np.testing.assert_array_equal(codes.dequantize(read(tmp_path), np.float64).T, m.weight())
    assert registry.open_source(tmp_path).format == "gptq"


def test_overrides_per_module(tmp_path: Path) -> None:
    """GPTQModel's dynamic: the first pattern that matches counts, "-:" keeps a module float."""
    modules = {"m.0.up": module(64, 32, 16), "m.1.up": module(64, 32, 32, 8), "m.2.up": module(64, 32, 64, 3)}
    tensors = {f"{n}.{p}": a for n, m in modules.items() for p, a in m.arrays("gptq-v2").items()}
    dynamic = {
        r"-:m\.3\.": {},
        r"+:.*\.1\.up": {"bits": 8, "group_size": 32},
        r"m\.[12]\.": {"bits": 3, "group_size": -1, "sym": False},
    }
    quant = settings("gptq-v2", dynamic=dynamic)
    dst = store(tmp_path / "a", tensors | {"m.3.up.weight": np.ones((4, 4), np.float16)}, quant)
    for name, m in modules.items():
        np.testing.assert_array_equal(codes.dequantize(read(dst, name), np.float64).T, m.weight())
    with pytest.raises(CheckpointError, match=r"m.0.up is packed, but '-:.*0' in dynamic"):
        registry.open_source(store(tmp_path / "b", tensors, quant | {"dynamic": {"-:.*0": {}} | dynamic}))


def test_the_written_config(tmp_path: Path) -> None:
    floats = {"model.layers.0.mlp.gate", "model.layers.1.mlp.down_proj"}
    packed = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1, 10) for p in ("up", "down")]
    packed = [m for m in packed if m not in floats]
    tensors: dict[str, Any] = {f"{m}.weight": np.ones((32, 64), np.float16) for m in floats}
    tensors |= {f"{m}.weight": canonical(64, 32, 16, zeros=None) for m in packed}
    tensors |= {
        "model.embed_tokens.weight": np.ones((8, 64), np.float16),
        "model.layers.0.input_layernorm.weight": np.ones(64, np.float16),
        "lm_head.weight": canonical(64, 32, 16),
    }
    dst = write(tmp_path / "out", tensors, "gptq")
    quant = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert quant == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 16,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {
            r"-:^model\.layers\.0\.mlp\.gate$": {},
            r"-:^model\.layers\.1\.mlp\.down_proj$": {},
        },
        "modules_in_block_to_quantize": [sorted(packed)],
    }
    source = registry.open_source(dst)
    assert source.info("lm_head.weight").packed is None
    # As optimum (at the end), vLLM (anywhere) and GPTQModel (the patterns) choose what is packed.
    entries = quant["modules_in_block_to_quantize"][0]
    everything = [*packed, *floats]
    assert {m for m in everything if any(m.endswith(e) for e in entries)} == set(packed)
    assert {m for m in everything if any(e in m for e in entries)} == set(packed)
    assert {m for m in everything if any(re.match(p[2:], m) for p in quant["dynamic"])} == floats


def test_blocks_that_are_alike_are_named_once(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {f"model.layers.{i}.mlp.gate.weight": np.ones((8, 64), np.float16) for i in range(2)}
    tensors |= {
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight": canonical(64, 32, 16)
        for i in range(2) for e in range(2) for p in ("w1", "w2")
    }  # fmt: skip
    quant = json.loads((write(tmp_path / "out", tensors) / "config.json").read_text())["quantization_config"]
    names = [f"mlp.experts.{e}.{p}" for e in range(2) for p in ("w1", "w2")]
    assert quant["modules_in_block_to_quantize"] == [names]


CONFIG_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 5}, "bits must be 2, 3, 4 or 8.*got 5"),
    "true": ({"bits": True}, "bits must be"),
    "text": ({"bits": "4"}, "bits must be"),
    "group": ({"group_size": 0}, "group_size must be"),
    "sym": ({"sym": 1}, "sym and desc_act must be"),
    "order": ({"desc_act": None}, "sym and desc_act must be"),
    "marlin": ({"checkpoint_format": "marlin"}, "layout 'marlin'; 'gptq' and 'gptq_v2' are readable"),
    "old marlin": ({"is_marlin_format": True}, "marlin"),
    "planar": ({"checkpoint_format": None, "format": "gptq_p"}, "layout 'gptq_p'"),
    "both": ({"format": "gptq"}, "layout 'gptq and gptq_v2'"),
    "words": ({"pack_dtype": "int16"}, "packs into 'int16'"),
    "dynamic": ({"dynamic": ["a"]}, "dynamic must be a table"),
    "rule": ({"dynamic": {"+:a": 3}}, "dynamic.*is not a table"),
    "rule bits": ({"dynamic": {"a": {"bits": 6}}}, "dynamic.*bits must be"),
    "rule format": ({"dynamic": {"a": {"format": "marlin"}}}, "dynamic.*asks for 'marlin'"),
    "pattern": ({"dynamic": {"(a+)+$": {"bits": 4}}}, "too complicated"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_refused_configs(tmp_path: Path, case: str) -> None:
    changes, message = CONFIG_REFUSALS[case]
    arrays = {f"{NAME}.{p}": a for p, a in module(64, 32, 16).arrays("gptq-v2").items()}
    path = store(tmp_path, arrays, settings("gptq-v2") | changes)
    with pytest.raises(FormatError, match=message):
        registry.open_source(path)


TENSOR_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no scales": ({"scales": None}, "lacks .*scales"),
    "no zeros": ({"qzeros": None}, "lacks .*qzeros"),
    "vector": ({"qweight": np.zeros(64, np.int32)}, "only matrices"),
    "empty": ({"scales": np.zeros((0, 32), np.float16)}, "only matrices"),
    "groups": ({"scales": np.ones((2, 32), np.float16)}, "do not fit"),
    "columns": ({"qzeros": np.zeros((4, 5), np.int32)}, "do not fit"),
    "rows": ({"qweight": np.zeros((9, 32), np.int32)}, "do not fit"),
    "dtype": ({"qweight": np.zeros((8, 32), np.uint32)}, "dtypes uint32"),
    "index type": ({"g_idx": np.zeros(64, np.float32)}, "not a list of integers"),
    "index length": ({"g_idx": np.zeros(63, np.int32)}, "do not fit"),
    "unequal": ({"g_idx": np.zeros(64, np.int32)}, "groups of 0 to 64 inputs"),
    "range": ({"g_idx": np.arange(64, dtype=np.int32)}, "names groups 0 to 63, there are 4"),
    "negative": ({"g_idx": np.full(64, -1, np.int32)}, "names groups -1"),
    "twice": ({"weight": np.zeros((32, 64), np.float16)}, "holds both"),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_refused_tensors(tmp_path: Path, case: str) -> None:
    parts, message = TENSOR_REFUSALS[case]
    path = saved(tmp_path, module(64, 32, 16), parts=parts)
    with pytest.raises(CheckpointError, match=message) as caught:
        registry.open_source(path)
    assert NAME in str(caught.value)


def test_other_refusals_of_the_reader(tmp_path: Path) -> None:
    m = module(96, 32, 48)
    arrays = {f"{NAME}.{p}": a for p, a in m.arrays("gptq-v2").items()}
    path = store(tmp_path / "a", arrays, settings("gptq-v2", group_size=64))
    with pytest.raises(CheckpointError, match=f"{NAME} has 96 inputs, which its group size 64 does not divide"):
        registry.open_source(path)
    path = saved(tmp_path / "b", module(64, 32, 16), parts={"scales": np.full((4, 32), np.inf, np.float16)})
    with pytest.raises(WeightError, match=r"scales.*NaN or inf"):
        read(path)


WRITE_REFUSALS: dict[str, tuple[dict[str, QuantizedTensor], str]] = {
    "bits": ({"m.weight": canonical(64, 32, 16, 6)}, "m.weight has 6 bits, gptq-v2 holds 2 or 3 or 4 or 8"),
    "outputs": ({"m.weight": canonical(64, 36, 16)}, "m.weight has 36 outputs, gptq-v2 needs a multiple of 8"),
    "outputs of 3 bits": ({"m.weight": canonical(64, 48, 16, 3)}, "48 outputs, gptq-v2 needs a multiple of 32"),
    "inputs": ({"m.weight": canonical(36, 32, 12)}, "36 inputs, gptq-v2 needs a multiple of 8; convert to 'compr"),
    "mixed": (
        {"m.0.weight": canonical(64, 32, 16), "m.1.weight": canonical(64, 32, 16, 8)},
        "m.1.weight has 8 bits, m.0.weight has 4.*'compressed-tensors'",
    ),
    "groups": (
        {"m.0.weight": canonical(64, 32, 16), "m.1.weight": canonical(64, 32, 32)},
        "m.1.weight has group size 32",
    ),
}


@pytest.mark.parametrize("case", WRITE_REFUSALS)
def test_refused_by_the_writer(tmp_path: Path, case: str) -> None:
    tensors, message = WRITE_REFUSALS[case]
    with pytest.raises(FormatError, match=message):
        write(tmp_path / "out", tensors)


@pytest.mark.parametrize("other", ["compressed-tensors", "awq-jax", "gptq"])
def test_there_and_back_is_byte_for_byte(tmp_path: Path, other: str) -> None:
    for i, (bits, form) in enumerate([(4, "zeros"), (4, "symmetric"), (3, "order"), (2, "zeros"), (8, "order")]):
        m = module(96, 64, 32, bits, symmetric=form == "symmetric", order=form == "order")
        a = saved(tmp_path / f"{i}-a", m, sym=form == "symmetric", desc_act=form == "order")
        conversion.checkpoint(a, tmp_path / f"{i}-b", other)
        conversion.checkpoint(tmp_path / f"{i}-b", tmp_path / f"{i}-c", "gptq-v2")
        first, last = (load_file(p / "model.safetensors") for p in (a, tmp_path / f"{i}-c"))
        assert first.keys() == last.keys()
        for key, array in first.items():
            assert last[key].tobytes() == array.tobytes(), key
            assert (last[key].dtype, last[key].shape) == (array.dtype, array.shape), key
