"""What lies beside the weights reaches every target by every way of writing; code does not, and nothing names it."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoTokenizer

import awq_jax
from awq_jax import convert
from awq_jax.convert import registry, tokenizer, writing
from awq_jax.convert.files import companions, manifest
from awq_jax.errors import CheckpointError

FIXTURE = Path(__file__).parent / "fixtures" / "autoawq-gemm"
KEPT = [
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "image_processor_config.json",
    "LICENSE.txt",
    "merges.txt",
    "NOTICE",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.model",
    "tokenizer.model.v3",
    "video_preprocessor_config.json",
    "vocab.json",
]
LEFT = ["modeling_mine.py", "tokenizer.model.py", "tokenizer.pkl", "runs.csv", "additional_chat_templates/evil.py"]
CODE = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Model"}
# All but one, which holds no weights with zero points, as the fixture has.
DIRECTORIES = [name for name, f in registry.FORMATS.items() if f.encoder and not f.suffix and name != "marlin"]


def furnish(directory: Path) -> None:
    """Put files of all kinds beside the weights, and name code in the configs."""
    for name in (*KEPT, *LEFT):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}" if path.suffix == ".json" else f"this is {name}")
    edit(directory / "config.json", auto_map=CODE, vision_config={"auto_map": CODE, "depth": 2})
    edit(directory / "preprocessor_config.json", auto_map={"AutoProcessor": "modeling_mine.P"}, size=3)
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(src: Path, out: Path, log: str) -> None:
    """All that is kept is there, byte by byte but for references to code; nothing else is."""
    for name in KEPT:
        if name != "preprocessor_config.json":
            assert (out / name).read_bytes() == (src / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists()]
    for name in ("modeling_mine.py", "tokenizer.model.py", "runs.csv", "tokenizer.pkl"):
        assert name in log
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert "auto_map" not in config["vision_config"]
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 3}
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert f"{file}: removed auto_map" in log
    for word in ("configuration_mine.Mine", "modeling_mine.Model", "modeling_mine.P", "tok.Tok"):
        assert word in log


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = tmp_path_factory.mktemp("packed") / "m"
    shutil.copytree(FIXTURE, src)
    furnish(src)
    return src


@pytest.mark.parametrize("format", DIRECTORIES)
def test_every_directory_format(tmp_path: Path, packed: Path, caplog: pytest.LogCaptureFixture, format: str) -> None:
    if format == "orbax" and importlib.util.find_spec("orbax") is None:
        pytest.skip("needs orbax-checkpoint")
    caplog.set_level(logging.INFO, "awq_jax")
    convert.checkpoint(packed, tmp_path / "out", to=format, allow_lossy=True)
    check(packed, tmp_path / "out", caplog.text)
    AutoTokenizer.from_pretrained(tmp_path / "out")  # asks nothing of code that is not there


def test_quantizing_on_disk_and_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "awq_jax")
    src = tmp_path / "m"
    tiny_checkpoints.checkpoint(src, num_hidden_layers=1)
    furnish(src)
    rtn = {"method": "rtn", "group_size": 16, "progress": False}
    awq_jax.quantize_checkpoint(src, tmp_path / "streamed", np.arange(64).reshape(2, 32), format="awq-jax", **rtn)
    check(src, tmp_path / "streamed", caplog.text)
    caplog.clear()
    awq_jax.load(src).save(tmp_path / "saved")
    check(src, tmp_path / "saved", caplog.text)
    named = tokenizer.from_directory(tmp_path / "saved").chat_template
    assert isinstance(named, dict)
    assert set(named) == {"default", "rag", "tool_use"}
    AutoConfig.from_pretrained(tmp_path / "saved")


def test_code_that_is_not_here_anyway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """References into other repositories work wherever the checkpoint lies."""
    caplog.set_level(logging.INFO, "awq_jax")
    src = tmp_path / "m"
    shutil.copytree(FIXTURE, src)
    elsewhere = {"AutoConfig": "owner/name--configuration_mine.Mine"}
    edit(src / "config.json", auto_map=elsewhere)
    convert.checkpoint(src, tmp_path / "out", to="awq-jax")
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == elsewhere
    assert "removed" not in caplog.text
    assert "not copied" not in caplog.text


def test_a_broken_companion_is_copied_as_it_is(tmp_path: Path) -> None:
    src = tmp_path / "m"
    shutil.copytree(FIXTURE, src)
    (src / "preprocessor_config.json").write_text("{")
    convert.checkpoint(src, tmp_path / "out", to="awq-jax")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == "{"


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    src = tmp_path / "m"
    shutil.copytree(FIXTURE, src)
    (tmp_path / "secret").write_text("x")
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates/a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        convert.checkpoint(src, tmp_path / "out", to="awq-jax")


def test_an_interrupted_run_sees_that_a_template_changed(tmp_path: Path) -> None:
    src = tmp_path / "m"
    shutil.copytree(FIXTURE, src)
    furnish(src)
    before = manifest.fingerprint(registry.open_source(src))
    (src / "additional_chat_templates/rag.jinja").write_text("another, longer")
    assert manifest.fingerprint(registry.open_source(src)) != before


def test_without_a_tokenizer_of_the_source_that_of_the_model_is_saved(tmp_path: Path) -> None:
    src = tmp_path / "m"
    src.mkdir()
    (src / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.ones(2, np.float32)}, src / "model.safetensors")
    source = registry.open_source(src)
    ours = tokenizer.from_directory(FIXTURE)
    writing.write_checkpoint(
        tmp_path / "out", [("a", np.ones(2))], source.config, "float", tokenizer=ours, extra=source
    )
    again = tokenizer.from_directory(tmp_path / "out")
    assert again(["Once upon"])["input_ids"] == ours(["Once upon"])["input_ids"]


def test_downloads_fetch_them_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fetch(repo: str, **options: Any) -> str:
        calls.append(options)
        shutil.copytree(FIXTURE, tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    registry.open_source("owner/name")
    folders = ["original/tokenizer.model", "onnx/tokenizer.json", "1_Pooling/config.json", "sub/chat_template.jinja.py"]
    files = [*KEPT, *LEFT, *folders, "sub/model.safetensors", "sub/LICENSE"]
    options = {k: calls[0][k] for k in ("allow_patterns", "ignore_patterns")}
    assert sorted(filter_repo_objects(files, **options)) == sorted(KEPT)


def test_patterns() -> None:
    assert all(companions.matches(name, companions.COMPANIONS) for name in KEPT)
    assert not companions.matches("sub/tokenizer.json", companions.COMPANIONS)
    assert fnmatch.fnmatchcase("sub/tokenizer.json", "*.json")  # why folders are counted


def test_only_what_names_code_beside_the_config_is_forgotten() -> None:
    elsewhere = "owner/name--configuration_mine.Mine"
    config = {"auto_map": {"AutoConfig": elsewhere, "AutoModel": "modeling_mine.Model"}, "size": 3}
    assert companions.without_code(config) == (
        {"auto_map": {"AutoConfig": elsewhere}, "size": 3},
        ["modeling_mine.Model"],
    )
