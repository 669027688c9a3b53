"""The model card: what it says is known, what others wrote is kept, and the hub's own parser reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fuzz
import huggingface_hub
import pytest

from awq_jax import errors
from awq_jax.config import AwqConfig
from awq_jax.convert import card, card_score, card_usage, conversion, registry
from awq_jax.convert.card import KEPT, README
from awq_jax.convert.format import Destination, Record
from awq_jax.convert.writing import write_checkpoint
from awq_jax.report import LayerReport, Report

SHA = "c0ffee" * 6 + "abcd"
OWN = "---\nlicense: other\nlicense_name: own\nlanguage:\n- en\n- no\nbase_model: someone/pretrained\n---\n# Mine, ü\n"
MADE = {"method": "awq+gptq", "calibration": "text: 4 x 8 = 32 tokens", "error_rounded": "0.02", "error": "0.01"}


def head(directory: Path) -> dict[str, Any]:
    """The front matter as the hub's library reads it."""
    data = huggingface_hub.ModelCard.load(directory / README, ignore_metadata_errors=False).data.to_dict()
    assert isinstance(data, dict)
    return data


def text(directory: Path) -> str:
    return (directory / README).read_text()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model as the hub's cache has it, with a card."""
    directory = tmp_path_factory.mktemp("hub") / "models--owner--the--model" / "snapshots" / SHA
    directory.parent.mkdir(parents=True)
    write_checkpoint(directory, [], fuzz.llama_config(64, 128), "float")
    (directory / README).write_text(OWN)
    return directory


@pytest.fixture(scope="module")
def packed(snapshot: Path) -> Path:
    """What a quantization of it writes."""
    directory = snapshot.parents[2] / "packed"
    extra = registry.open_source(snapshot)
    given = fuzz.weights(bits=4).items(), fuzz.llama_config(64, 128), "gemm", AwqConfig(group_size=64), MADE
    write_checkpoint(directory, *given, extra=extra)
    return directory


def test_what_is_known_is_said(packed: Path) -> None:
    found = head(packed)
    assert {k: v for k, v in found.items() if k != "quantization"} == {
        "base_model": "owner/the--model", "base_model_relation": "quantized", "license": "other",
        "license_name": "own", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["awq", "4-bit", "awq_jax"],
    }  # fmt: skip
    about = {"model": "the--model", **MADE, "revision": SHA, "bits": 4, "group_size": 64}
    assert found["quantization"] == about
    said = text(packed)
    for line in (
        "# the--model, 4 bits, gemm", "| bits | 4, groups of 64, asymmetric; 7 of ", "| calibrated on | text: 4 x 8",
        "| output error | 0.01 as stored, 0.02 rounded to nearest", "vllm serve MODEL",
        "(`pip install transformers gptqmodel",
        "Made from [owner/the--model](https://huggingface.co/owner/the--model).", f"[{KEPT}]({KEPT})",
        'awq-jax generate MODEL "Why is the sky blue?"\n',
    ):  # fmt: skip
        assert line in said, line
    assert "perplexity" not in said  # which was not measured
    assert "llama.cpp" not in said
    assert (packed / KEPT).read_text() == OWN


def test_a_conversion_says_it_again(packed: Path, tmp_path: Path) -> None:
    conversion.checkpoint(packed, tmp_path / "ct", "compressed-tensors")
    conversion.checkpoint(tmp_path / "ct", tmp_path / "mlx", "mlx", allow_lossy=True)
    conversion.checkpoint(tmp_path / "ct", tmp_path / "float", "float")
    conversion.checkpoint(tmp_path / "ct", tmp_path / "orbax", "orbax")
    before = head(packed)
    for name, library, tags in (
        ("ct", "transformers", ["compressed-tensors", "awq", "4-bit", "awq_jax"]),
        ("mlx", "mlx", ["mlx", "awq", "4-bit", "awq_jax"]),
        ("orbax", "awq_jax", ["orbax", "awq", "4-bit", "awq_jax"]),
    ):
        found = head(tmp_path / name)
        assert {**found, "library_name": "", "tags": []} == {**before, "library_name": "", "tags": []}
        assert (found["library_name"], found["tags"]) == (library, tags)
        assert (tmp_path / name / KEPT).read_text() == OWN
    assert "weights moved by at most" in text(tmp_path / "mlx")
    floats = head(tmp_path / "float")
    assert "bits" not in floats["quantization"]
    assert floats["quantization"]["method"] == "awq+gptq"
    assert floats["tags"] == ["awq_jax"]
    assert "# the--model, dequantized, float" in text(tmp_path / "float")


def test_a_card_that_was_edited_is_kept(packed: Path, tmp_path: Path) -> None:
    conversion.checkpoint(packed, tmp_path / "one", "gemm")
    edited = text(tmp_path / "one").replace("## How to run it", "It is great.\n\n## How to run it")
    (tmp_path / "one" / README).write_text(edited)
    conversion.checkpoint(tmp_path / "one", tmp_path / "two", "gptq-v2")
    assert (tmp_path / "two" / KEPT).read_text() == edited
    assert "It is great" not in text(tmp_path / "two")
    assert head(tmp_path / "two")["base_model"] == "owner/the--model"
    conversion.checkpoint(packed, tmp_path / "one", "gemm", overwrite=True)
    conversion.checkpoint(packed, tmp_path / "again", "gemm")
    assert text(tmp_path / "again") == text(tmp_path / "one")  # the same again, whatever was there


def test_a_local_model_has_no_base_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mine", [], fuzz.llama_config(64, 128), "float")
    (tmp_path / "mine" / README).write_text(OWN)
    conversion.checkpoint(tmp_path / "mine", tmp_path / "out", "float")
    found = head(tmp_path / "out")
    # What its card calls base model is that of a fine-tune, which `mine` is no quantization of.
    assert "base_model" not in found
    assert "base_model_relation" not in found
    assert found["license"] == "other"
    assert str(tmp_path) not in text(tmp_path / "out")


def test_quantized_by_others(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    for file in packed.iterdir():
        if not file.name.startswith("README"):
            (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "theirs" / README).write_text("---\nbase_model: a/b\n---\n")
    conversion.checkpoint(tmp_path / "theirs", tmp_path / "out", "compressed-tensors")
    found = head(tmp_path / "out")
    assert (found["base_model"], found["base_model_relation"]) == ("a/b", "quantized")
    assert found["quantization"] == {"model": "theirs", "method": "awq", "bits": 4, "group_size": 64}
    assert "calibrated" not in text(tmp_path / "out")


@pytest.mark.parametrize(
    "own",
    ["", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [[1]]\ntags: 3\nlicense_name: 2020-01-01\n---\n", "\xff"],
)
def test_a_card_that_says_nothing_is_kept_too(own: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mine", [], fuzz.llama_config(64, 128), "float")
    (tmp_path / "mine" / README).write_bytes(own.encode("latin-1"))
    conversion.checkpoint(tmp_path / "mine", tmp_path / "out", "float")
    assert "license" not in head(tmp_path / "out")
    assert (tmp_path / "out" / KEPT).read_bytes() == own.encode("latin-1")


def test_a_link_out_of_the_checkpoint_is_not_followed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mine", [], fuzz.llama_config(64, 128), "float")
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\nsecret")
    (tmp_path / "mine" / README).unlink()
    (tmp_path / "mine" / README).symlink_to(tmp_path / "secret")
    conversion.checkpoint(tmp_path / "mine", tmp_path / "out", "float")
    assert not (tmp_path / "out" / KEPT).exists()
    assert "license" not in head(tmp_path / "out")


def test_beside_a_file_only_in_a_folder_of_its_own(packed: Path, tmp_path: Path) -> None:
    records, source = [], registry.open_source(packed)
    destination = Destination(config=source.config)
    for name, there, written in (
        ("own", {}, True), ("again", {README: None}, True), ("theirs", {README: "# mine"}, False),
        ("shared", {"notes.txt": ""}, False),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        for file, content in there.items():
            (folder / file).write_text(text(tmp_path / "own") if content is None else content)
        (folder / "m.gguf").write_text("")
        before = sorted(folder.iterdir())
        card.write_beside(folder / "m.gguf", "gguf-q4_1", destination, records, source)
        if written:
            assert "llama-cli -m m.gguf -p" in text(folder)
            assert head(folder)["library_name"] == "gguf"
            assert (folder / KEPT).read_text() == OWN
        else:
            assert sorted(folder.iterdir()) == before
            assert there.get(README) is None or text(folder) == there[README]


def test_how_to_run_it_is_told_of_engines_that_serve_it() -> None:
    config = {"model_type": "llama"}

    def engines(format: str, family: str = "llama", **packed: Any) -> list[str]:
        how = {"bits": 4, "group_size": 128} | packed
        record = Record("model.layers.0.mlp.up_proj.weight", (256, 256), "float16", **how)
        return card_usage.served_by(registry.get(format), {"model_type": family}, [record])

    assert engines("gemm") == ["vllm", "transformers", "mlx"]
    assert engines("gptq", symmetric=True) == ["vllm", "transformers"]
    assert engines("compressed-tensors") == ["vllm"]  # transformers 5.24 cannot load zero points
    assert engines("compressed-tensors", symmetric=True) == ["vllm", "transformers"]
    assert engines("gptq") == ["transformers"]
    assert engines("gemm", "falcon") == []
    assert engines("mlx") == ["mlx"]
    assert engines("gguf-q8_0", bits=8) == ["llama.cpp"]
    assert not any(engines(f) for f in ("awq-jax", "orbax", "marlin", "gemv", "gemv_fast", "llm-awq"))
    for f in registry.FORMATS.values():
        served = card_usage.served_by(f, config, [])
        said = card.render(f, Destination(config=config), [], None)
        for engine, command in {"vllm": "vllm serve", "mlx": "mlx_lm.generate", "llama.cpp": "llama-cli"}.items():
            assert (command in said) == (engine in served)


def test_the_report_is_told_without_folders_and_texts() -> None:
    layer = LayerReport("a", "g", (2, 2), 4, 2, False, 8, 4, error_rtn=0.04, error=0.01)
    report = Report(
        {"method": "awq"}, [layer], {}, 3, {}, 8, 4, "/home/me/secret/book.txt: 1 x 3 = 3 tokens; begins 'x'"
    )
    told = {"method": "awq", "calibration": "book.txt: 1 x 3 = 3 tokens", "error_rounded": "0.04", "error": "0.01"}
    assert card.of_report(report) == told
    report.layers, report.calibration = [], "hf:a/b (column text): 1 x 3"
    assert card.of_report(report) == {"method": "awq", "calibration": "hf:a/b (column text): 1 x 3"}
    json.dumps(told)


def test_a_measured_perplexity_is_added_and_goes_with_the_same_weights(packed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    conversion.checkpoint(packed, directory, "gemm")
    before = text(directory)
    for told in ("9.000 on 8 tokens", "7.500 on 8 tokens of a | b"):
        assert card_score.add(directory, told) == directory / README
        assert card.untouched(text(directory))
        assert head(directory)["quantization"]["perplexity"] == told
    assert [p.name for p in directory.iterdir() if p.name.startswith(".")] == []
    added = [line for line in text(directory).splitlines() if line not in before.splitlines()]
    assert "| perplexity | 7.500 on 8 tokens of a \\| b |" in added
    conversion.checkpoint(directory, tmp_path / "exact", "compressed-tensors")
    assert head(tmp_path / "exact")["quantization"]["perplexity"] == told
    conversion.checkpoint(directory, tmp_path / "moved", "mlx", allow_lossy=True)
    assert "perplexity" not in head(tmp_path / "moved")["quantization"]
    (directory / README).write_text(text(directory) + "edited\n")
    with pytest.raises(errors.CheckpointError, match="edited"):
        card_score.add(directory, told)
    (directory / README).unlink()
    with pytest.raises(errors.CheckpointError, match=r"no README\.md"):
        card_score.add(directory, told)
