"""What is said of bytes that are no text, of empty files, of a fallback, of other settings and of Ctrl-C."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
import tiny_checkpoints

import awq_jax
from awq_jax import cli, errors, evaluate
from awq_jax.cli import entry, inspect
from awq_jax.convert import chat_template, conversion
from awq_jax.stream import job

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
RTN = {"group_size": 16, "method": "rtn", "progress": False}
NO_UTF8 = b'{"a": "\xff"}'


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("messages") / "float"
    tiny_checkpoints.checkpoint(directory, "llama")
    return directory


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", NO_UTF8, r"config\.json is not valid JSON: its byte 7 is not UTF-8"),
        ("config.json", b"", r"config\.json is empty"),
        ("config.json", b"{}", "config.json has no model_type"),
        ("generation_config.json", NO_UTF8, "its byte 7 is not UTF-8"),
        ("tokenizer.json", NO_UTF8, "the tokenizer files of .* cannot be read"),
        ("model.safetensors", b"", r"model\.safetensors is empty"),
    ],
)
def test_a_file_of_a_checkpoint(source, tmp_path, name, content, told):
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / name).write_bytes(content)
    with pytest.raises(errors.AwqError, match=told):
        awq_jax.load(copy)


def test_an_empty_gguf_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(errors.CheckpointError, match=r"a\.gguf is truncated: it is empty"):
        awq_jax.load(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.npy", "a.parquet"])
def test_an_empty_file_of_text(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(errors.CalibrationError, match=r"a\.\w+ is empty"):
        awq_jax.data.load(tmp_path / name)


def test_a_prompt_of_other_bytes(source, capsys, monkeypatch):
    assert cli.main(["generate", str(source), "hi \udcff", "--max-new-tokens", "1"]) == 2
    assert "character 3 of a text is no character: bytes that are not UTF-8?" in capsys.readouterr().err
    with monkeypatch.context() as patched, (source / "model.safetensors").open(encoding="utf-8") as f:
        patched.setattr("sys.stdin", f)
        assert cli.main(["generate", str(source), "-"]) == 2
    assert "the prompt is not UTF-8 text" in capsys.readouterr().err


def test_a_fallback_of_format_and_other_settings(source, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "awq_jax")
    awq_jax.quantize_checkpoint(source, tmp_path / "packed", TOKENS, bits=3, **RTN)
    assert "wrote compressed-tensors, because model.layers.0.mlp.down_proj.weight has 3 bits, gemm holds 4" in [
        r.getMessage() for r in caplog.records
    ]
    monkeypatch.setattr("awq_jax.stream.parts.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        awq_jax.quantize_checkpoint(source, tmp_path / "other", TOKENS, bits=3, **RTN)
    with pytest.raises(errors.CheckpointError, match=r"settings; bits=3 then and bits=4 now; dtype=None then and"):
        awq_jax.quantize_checkpoint(source, tmp_path / "other", TOKENS, dtype="float32", **RTN)


def test_space_is_named_only_where_it_is_short(source, tmp_path, monkeypatch):
    for number, told in ((28, "Free some space"), (5, "Repair what that names")):

        def fail(*_, number=number):
            raise OSError(number, "as said")

        monkeypatch.setattr(conversion, "_to_directory", fail)
        with pytest.raises(errors.CheckpointError, match=told):
            conversion.checkpoint(source, tmp_path / "out", "awq-jax")


def test_interrupted(tmp_path, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.quantize, "run", interrupted)
    monkeypatch.setattr(inspect, "run", interrupted)
    for left, told in ((False, "awq-jax: interrupted\n"), (True, "awq-jax: interrupted; the same command continues\n")):
        if left:
            (tmp_path / ".out.quantizing").mkdir()
        assert cli.main(["quantize", "float", str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err == told
    assert cli.main(["inspect", "float"]) == 130
    assert capsys.readouterr().err == "awq-jax: interrupted\n"


def test_no_standard_error_from_few_windows():
    scores = np.asarray([1.0, 2.0, 3.0, 2.0, 1.0])
    assert evaluate._mean(scores[:3], np.ones(3))[1] is None
    assert evaluate._mean(scores, np.ones(5))[1] == pytest.approx(scores.std(ddof=1) / 5**0.5)


def test_an_unfinished_run_of_an_older_version_names_settings_only():
    assert job._changed_settings("0" * 64, json.dumps({"bits": 4})) == ""


def test_transformers_says_nothing_of_pytorch(monkeypatch):
    def tool(a: int) -> int:
        """Say.

        Args:
            a: a number
        """
        return a

    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # what transformers asks before it says so
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    assert chat_template._schema(tool)["type"] == "function"
    assert os.environ[name] == "1"
