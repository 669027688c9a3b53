"""``awq-jax inspect``: what it shows, what it finds, and what it does without reading weights."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import fuzz_mutations
import numpy as np
import pytest

from awq_jax import cli
from awq_jax.cli import contents
from awq_jax.convert import conversion, registry
from awq_jax.convert.files.safetensors import INDEX, read_header
from awq_jax.convert.source import DirectorySource
from awq_jax.convert.writing import write_checkpoint

LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


def run(*argv: Any) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = cli.main(["inspect", *map(str, argv), "--quiet"])
        except SystemExit as e:
            code = int(e.code or 0)
    return code, out.getvalue()


def found(*argv: Any) -> tuple[int, dict[str, Any]]:
    code, out = run(*argv, "--json")
    assert code in (0, 1), out
    return code, json.loads(out)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect") / "native"
    write_checkpoint(directory, fuzz.weights(bits=4).items(), fuzz.llama_config(64, 128), "awq-jax")
    return directory


@pytest.fixture(scope="module")
def gemm(native: Path) -> Path:
    directory = native.parent / "gemm"
    conversion.checkpoint(native, directory, "gemm", max_shard_bytes=fuzz.SHARD)
    return directory


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[fuzz.Seed]:
    """One of each format that is written, and those in act-order."""
    every = fuzz.corpus(tmp_path_factory.mktemp("corpus"))[:-1]
    return [*{s.format: s for s in reversed(every)}.values(), *(s for s in every if s.variant == "act-order")]


def test_without_check_nothing_but_headers_is_read(gemm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectorySource, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr("awq_jax.convert.files.safetensors.SafetensorsDir.read", lambda *_: pytest.fail("was read"))
    code, got = found(gemm)
    assert code == 0
    assert (got["format"], got["model_type"], got["bits"], got["group_size"]) == ("gemm", "llama", [4], [64])
    assert (got["symmetric"], got["act_order"], got["quantized"]) == ([False], False, 7)
    assert got["float_linears"] == ["lm_head.weight"]
    assert got["problems"] == []
    stored = [e for file in gemm.glob("*.safetensors") for e in read_header(file)[0].values()]
    assert got["bytes"] == sum(e.nbytes for e in stored)
    by_name = {t["name"]: t for t in got["tensors"]}
    assert by_name[f"{LAYER}.mlp.down_proj.weight"] == {
        "name": f"{LAYER}.mlp.down_proj.weight", "shape": [64, 128], "type": "4-bit asymmetric", "bits": 4,
        "group_size": 64, "symmetric": False, "act_order": False, "scales": "float16",
        "bytes": 64 * 128 // 2 + 2 * 64 * 2 + 2 * 64 // 2,
    }  # fmt: skip
    code, text = run(gemm)
    assert code == 0
    assert "left float  lm_head.weight" in text
    assert "no problem found in the headers" in text
    table, summary = text.index("self_attn.q_proj.weight  "), text.index("format      gemm")
    assert table < text.index("no problem found") < summary  # what stands last is what a terminal shows
    assert text.splitlines()[-4].startswith("scaled      q k v <- ")


def test_every_form_ends_with_its_summary(gemm: Path) -> None:
    lines = run(gemm, "--plan")[1].splitlines()
    assert lines[-1].startswith("5 scale groups of 8 weights: 5 are scaled, 0 have nothing")
    assert sum(line.startswith("    absorb") for line in lines) == 5
    lines = run(gemm, "--devices", "2")[1].splitlines()
    assert [line.partition(":")[0].partition(",")[0] for line in lines[-2:]] == [
        "2 devices",
        "keys and values in 16 bits",
    ]
    assert len(lines) > 6


def test_every_format_is_described_and_passes_its_check(seeds: list[fuzz.Seed], tmp_path: Path) -> None:
    for seed in seeds:
        directory = tmp_path / f"{seed.format}-{seed.variant}"
        fuzz.write(directory, seed.files)
        code, got = found(fuzz.opens(directory, seed.files), "--check")
        assert (code, got["problems"]) == (0, []), seed.format
        assert {t["name"]: tuple(t["shape"]) for t in got["tensors"]} == {n: w.shape for n, w in seed.truth.items()}
        assert got["bytes_on_disk"] >= sum(len(d) for n, d in seed.files.items() if n.endswith(".safetensors"))
        assert bool(got["bits"]) == (seed.format != "float")
        assert got["act_order"] == (seed.variant == "act-order" and seed.format != "float")


def big(directory: Path) -> None:
    """A checkpoint of 70 billion parameters in AutoAWQ's layout, of which only the headers take space."""
    hidden, ffn, kv, layers = 8192, 28672, 1024, 80
    config = fuzz.llama_config(hidden, ffn) | {
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
                                "version": "gemm"},
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
               "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, ffn), "mlp.up_proj": (hidden, ffn),
               "mlp.down_proj": (ffn, hidden)}  # fmt: skip
    index = {}
    for layer in range(layers):
        tensors: dict[str, Any] = {f"model.layers.{layer}.input_layernorm.weight": ("F16", [hidden], 2)}
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = ("F16", [hidden], 2)
        for name, (k, n) in linears.items():
            module = f"model.layers.{layer}.{name}"
            tensors[f"{module}.qweight"] = ("I32", [k, n // 8], 4)
            tensors[f"{module}.qzeros"] = ("I32", [k // 128, n // 8], 4)
            tensors[f"{module}.scales"] = ("F16", [k // 128, n], 2)
        if layer == 0:
            tensors |= {"model.norm.weight": ("F16", [hidden], 2)}
            tensors |= {n: ("F16", [128256, hidden], 2) for n in ("lm_head.weight", "model.embed_tokens.weight")}
        header, end = {}, 0
        for name, (dtype, shape, size) in tensors.items():
            nbytes = int(np.prod(shape)) * size
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        data = fuzz_mutations.closed(header, b"")
        (directory / file).write_bytes(data)
        with (directory / file).open("r+b") as f:
            f.truncate(len(data) + end)
        index |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": index}))


def test_seventy_billion_parameters_in_seconds(tmp_path: Path) -> None:
    big(tmp_path / "big")
    start = time.process_time()
    code, got = found(tmp_path / "big")
    assert time.process_time() - start < 5  # 1 s; whatever else the machine does
    assert code == 0
    assert got["parameters"] == 70_553_706_496
    assert 38e9 < got["bytes_on_disk"] < 42e9


def data_of(directory: Path, name: str) -> tuple[Path, Any]:
    for file in sorted(directory.glob("*.safetensors")):
        entries, _ = read_header(file)
        if name in entries:
            return file, entries[name]
    raise AssertionError(name)


def poke(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    """Change a tensor's values in place."""

    def damage(directory: Path) -> None:
        file, entry = data_of(directory, name)
        data = bytearray(file.read_bytes())
        view = np.frombuffer(data, entry.dtype, int(np.prod(entry.shape)), entry.offset).reshape(entry.shape)
        change(view)
        file.write_bytes(data)

    return damage


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change ``quantization_config``, or with ``top`` the config itself."""

    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (config if changes.pop("top", False) else config["quantization_config"]).update(changes)
        (directory / "config.json").write_text(json.dumps(config))

    return damage


def total_size(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (directory / INDEX).write_text(json.dumps(index))


def forgotten(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))


def extra_shard(directory: Path) -> None:
    (directory / "extra.safetensors").write_bytes(fuzz_mutations.closed({}, b""))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "NaN": ("gemm", poke(f"{Q}.scales", lambda a: a.__setitem__((0, 0), np.nan)), f"{Q}.weight",
        "holds NaN or inf"),
    "float inf": ("gemm", poke("model.norm.weight", lambda a: a.__setitem__(3, np.inf)), "model.norm.weight",
        "1 of 64 values"),
    "float zeros": ("gemm", poke("lm_head.weight", lambda a: a.fill(0)), "lm_head.weight", "every value is 0"),
    "zero scales": ("gemm", poke(f"{Q}.scales", lambda a: a[0, :3].fill(0)), f"{Q}.weight", "3 of 64 scales are 0"),
    "equal codes": ("gemm", poke(f"{Q}.qweight", lambda a: a.fill(0x33333333)), f"{Q}.weight",
        "every code is the same"),
    "zero points": ("native", poke(f"{Q}.weight.zeros", lambda a: a[0, :2].fill(16)), f"{Q}.weight",
        "2 of 64 zero points"),
    "off by one": ("native", poke(f"{Q}.weight.zeros", lambda a: a.fill(7)), f"{Q}.weight",
        "every zero point is 7, one off 8"),
    "not converted": ("gemm", settings(modules_to_not_convert=["q_proj"]),
        "config.json", f"lists {Q} in modules_to_not"),
    "total size": ("gemm", total_size, "files", "bytes in all, the files hold"),
    "not in the index": ("gemm", forgotten, "files", "holds model.norm.weight, of which"),
    "not read": ("gemm", extra_shard, "files", "extra.safetensors is not in"),
    "more layers": ("gemm", settings(top=True, num_hidden_layers=2), "model",
        "model.layers.1.input_layernorm.weight is missing"),
    "another size": ("gemm", settings(top=True, vocab_size=65), "model",
        "has shape (64, 64), config.json implies (65, 64)"),
    "bad config": ("gemm", settings(top=True, num_attention_heads=-4), "model", "num_attention_heads"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_wrong_is_found(native: Path, gemm: Path, tmp_path: Path, case: str) -> None:
    base, damage, where, what = DAMAGES[case]
    directory = tmp_path / "damaged"
    fuzz.write(directory, fuzz._files(gemm if base == "gemm" else native))
    damage(directory)
    code, got = found(directory, "--check")
    assert code == 1
    hits = [p for p in got["problems"] if p["where"] == where]
    assert any(what in p["what"] for p in hits), got["problems"]
    assert {p["where"] for p in got["problems"]} == {where}
    code, text = run(directory, "--check")
    assert code == 1
    assert "problems\n" in text
    assert found(directory)[0] == 0  # only a check fails


def test_settings_that_disagree_with_tensors(tmp_path: Path) -> None:
    from awq_jax.cli import check
    from awq_jax.convert.source import Info, Packed

    source = SimpleNamespace(
        config={"quantization_config": {"quant_method": "x", "bits": 8, "group_size": 32}},
        names=lambda: ["a.weight", "b.weight", "b.bias"],
        info=lambda name: Info((2, 64), "float32", 64, None if name == "b.bias" else Packed(4, 64, True, "float16")),
    )
    assert check.config(source) == [
        "config.json says group size 32, a, b has 64",
        "config.json says 8 bits, a, b has 4",
    ]
    source.names = lambda: ["b.bias"]
    assert check.config(source) == ["config.json says that the model is quantized, but no tensor is"]


def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", [("a\x1b[2Jb", np.ones((2, 2), np.float32))], {}, "float")
    code, text = run(tmp_path / "x")
    assert code == 0
    assert "\x1b" not in text
    assert "a\\x1b[2Jb" in text


def hub(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[str]:
    """Pretend that ``directory`` is ``owner/name@v1`` on the hub; returns what is fetched, as it happens."""
    import huggingface_hub

    fetched: list[str] = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        assert (repo, revision) == ("owner/name", "v1")
        fetched.append(name)
        return str(directory / name)

    def metadata(repo: str, revision: str | None = None) -> Any:
        files = {}
        for path in sorted(directory.glob("*.safetensors")):
            header, _ = fuzz_mutations.opened(path.read_bytes())
            extra = header.pop("__metadata__", {})
            files[path.name] = SimpleNamespace(
                metadata=extra, tensors={n: SimpleNamespace(**i) for n, i in header.items()}
            )
        index = directory / INDEX
        data = json.loads(index.read_text()) if index.exists() else {"metadata": None, "weight_map": {}}
        return SimpleNamespace(files_metadata=files, sharded=index.exists(), **data)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repo, name, revision=None: (directory / name).exists())
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    return fetched


def test_a_hub_id_costs_config_and_headers(
    seeds: list[fuzz.Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in seeds:
        if set(seed.files) == {"model.gguf"} or seed.format == "orbax":
            continue
        directory = tmp_path / f"{seed.format}-{seed.variant}"
        fuzz.write(directory, seed.files)
        fetched = hub(monkeypatch, directory)
        code, got = found("owner/name@v1")
        assert (code, got["bytes_on_disk"], got["problems"]) == (0, None, [])
        assert fetched == [n for n in ("config.json", "quant_config.json") if n in seed.files]
        local = contents.describe(registry.open_source(directory, packed=True))
        assert {**got, "bytes_on_disk": 0, "problems": 0} == {**local, "bytes_on_disk": 0, "problems": 0}, seed.format


def test_whether_it_is_supported_is_told_from_the_headers(
    gemm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, gemm)
    code, got = found("owner/name@v1")
    assert (code, got["supported"], got["reason"]) == (0, True, None)
    groups = ["q k v <- input_layernorm", "o <- v", "gate up <- post_attention_layernorm", "down <- up"]
    assert got["plan"] == {"groups": groups, "unscaled": [], "float": []}
    text = run("owner/name@v1")[1]
    assert "supported   yes\n" in text
    assert "scaled      q k v <- input_layernorm\n            o <- v\n" in text
    assert run("owner/name@v1", "--plan")[1] == run(gemm, "--plan")[1]

    unknown = tmp_path / "unknown"
    fuzz.write(unknown, fuzz._files(gemm))
    settings(top=True, model_type="llama9")(unknown)
    hub(monkeypatch, unknown)
    code, got = found("owner/name@v1")
    assert (code, got["supported"], got["plan"]) == (0, False, None)
    assert "'llama9' is not supported; its nearest supported relative is 'llama'" in got["reason"]
    assert "supported   no: model_type 'llama9'" in run("owner/name@v1")[1]
    code, text = run("owner/name@v1", "--plan")
    assert code == 2
    assert "docs/extending/family.md" in text


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    hf = fuzz.llama_config(64, 128) | {"model_type": "gptj", "rotary_dim": 8, "n_inner": 128, "num_hidden_layers": 80}
    hf["hidden_act"] = "gelu_new"
    (tmp_path / "config.json").write_text(json.dumps(hf))
    code, got = found(tmp_path)
    assert (code, got["supported"], got["tensors"], got["bytes_on_disk"]) == (0, True, [], None)
    assert got["plan"]["groups"] == ["q k v up <- input_layernorm", "o <- v"]
    (unscaled,) = got["plan"]["unscaled"]
    assert unscaled.startswith("down: the scaled value is also used by gelu")
    sizes = 80 * (4 * 64 * 64 + 2 * 64 * 128 + 64 + 128 + 2 * 64) + 2 * 64 * hf["vocab_size"] + 2 * 64
    assert got["parameters"] == sizes + hf["vocab_size"]  # GPT-J's head has a bias
    text = run(tmp_path)[1]
    assert "config.json alone, gptj" in text
    assert "not scaled  down: the scaled value" in text
    assert run(tmp_path, "--check")[0] == 2  # there is nothing to check
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}'
    )
    assert found(tmp_path)[1]["supported"]  # the files that the index names are not there yet
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "supported   no: model_type 'mamba'" in run(tmp_path)[1]
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": -1}))
    assert "supported   no: config.json: num_hidden_layers must be" in run(tmp_path)[1]


def test_a_hub_that_does_not_answer_or_misbehaves(gemm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub(monkeypatch, gemm)
    monkeypatch.setattr(
        huggingface_hub,
        "get_safetensors_metadata",
        lambda *_, **__: SimpleNamespace(files_metadata={"../x.safetensors": None}, sharded=False),
    )
    code, text = run("owner/name@v1")
    assert code == 2
    assert "outside of its top folder" in text

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    code, text = run("owner/name@v1")
    assert code == 2
    assert "ConnectionError: no route" in text
