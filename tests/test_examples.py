"""The examples run, and the packed models they end with still do their job."""

import asyncio
import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = pytest.importorskip("tiny_checkpoints", reason="makes checkpoints with torch", exc_type=ImportError)
    path = tmp_path_factory.mktemp("source")
    tiny.checkpoint(path)
    return path


@pytest.mark.slow
def test_linen_app() -> None:
    before, after = example("linen_app").main()
    assert before < 2.0  # it learned: guessing costs log(64) = 4.2
    assert after < before + 0.15


def test_nnx_app() -> None:
    before, after = example("nnx_app").main()
    assert before > 0.8
    assert after > before - 0.03


def test_checkpoint_chat(checkpoint: Path, tmp_path: Path) -> None:
    answer = example("checkpoint_chat").main(
        checkpoint, tmp_path / "packed", "hello", samples=2, max_new_tokens=4, group_size=16
    )
    assert isinstance(answer, str)
    assert (tmp_path / "packed" / "config.json").is_file()


@pytest.mark.slow
def test_calibrate_once(checkpoint: Path) -> None:
    rows = example("calibrate_once").main(checkpoint, samples=4, eval_tokens=256, group_size=16)
    assert set(rows) == {"float", "4-bit", "3-bit", "mixed"}
    assert all(math.isfinite(v) for v in rows.values())


@pytest.mark.slow
def test_serve_app(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["serve_app.py", str(checkpoint), "--new-tokens", "3", "--length", "64"])
    monkeypatch.setattr("awq_jax.cache_programs", lambda: None)
    asyncio.run(example("serve_app").main())
    assert capsys.readouterr().out.count("---") == 4
