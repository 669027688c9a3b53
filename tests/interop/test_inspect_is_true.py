"""What ``awq-jax inspect --for ENGINE`` says of what our commands write is what the engine does (on a CPU).

``benchmarks/results/inspect.json`` keeps what each did; ``tests/convert/test_engines.py`` holds the rules to that.
Pieces: ``-k mlx``.
"""

from __future__ import annotations

import json
from pathlib import Path

import inspected
import peers
import pytest

from awq_jax.convert.engines import verdicts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", inspected.ENGINES)
def test_the_engine_does_what_is_said(engine: str, tmp_path: Path) -> None:
    for name in inspected.ENVIRONMENTS[engine]:
        peers.environment(name)
    recorded = {row["name"]: row for row in json.loads(inspected.RESULTS.read_text())}
    rows = inspected.run(inspected.PLANS, [engine], tmp_path / "work")
    tried = [row for row in rows if engine in row["found"]]
    assert len(tried) > 40
    wrong = []
    for row in tried:
        done = inspected.served(engine, row["found"][engine])
        said = verdicts.verdict(engine, inspected.contents_of(row))
        if done != said.on_cpu or done != inspected.served(engine, recorded[row["name"]]["found"][engine]):
            wrong.append((row["name"], row["found"][engine], said.line()))
        assert row.get("gpus") == recorded[row["name"]].get("gpus") or engine != "vllm", row["name"]
    assert wrong == []
