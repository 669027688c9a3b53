"""Families in vLLM's engine for CPUs, as ``benchmarks/results/vllm.json`` has them.

A family takes some ten seconds; pieces (``-k mixtral``) cost little more than their part.
"""

from __future__ import annotations

import json
from typing import Any

import peers
import pytest
import vllm_families

pytestmark = pytest.mark.slow
FOUND = json.loads(vllm_families.RESULTS.read_text())


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Of `vllm_families.run`, for the families that this session tests."""
    peers.environment("vllm")
    here = [item for item in request.session.items if item.path == request.path]
    chosen = sorted({item.callspec.params["family"] for item in here if isinstance(item, pytest.Function)})
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i in range(0, len(chosen), vllm_families.BATCH):
        rows = vllm_families.run(chosen[i : i + vllm_families.BATCH], tmp_path_factory.mktemp("vllm"))
        found |= {(row["family"], row["way"], row["kernels"]): row for row in rows}
    return found


@pytest.mark.parametrize("family", sorted({row["family"] for row in FOUND}))
def test_it_is_as_it_was_found(family: str, results: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    for row in (row for row in FOUND if row["family"] == family):
        if row["kernels"] == "engine":  # which it has depends on the processor
            continue
        now = results[family, row["way"], row["kernels"]]
        assert vllm_families.agrees(now) == vllm_families.agrees(row), (row, now)
