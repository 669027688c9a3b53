"""What ``convert --to float`` makes of each family is what transformers saves, loads and computes with."""

from __future__ import annotations

import json
from pathlib import Path

import float_files
import multimodal
import pytest

from awq_jax import models


def test_the_results_are_of_all_families() -> None:
    found = json.loads(float_files.RESULTS.read_text())
    carried = {c.family for c in multimodal.CARRIED}
    assert set(found) == set(float_files.CASES) == set(models.supported()) - carried
    assert {family: r["error"] for family, r in found.items() if "error" in r} == {}
    assert float_files.RESULTS.with_suffix(".md").read_text() == float_files.page(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(float_files.CASES))
def test_float_files_of_a_family(family: str, tmp_path: Path) -> None:
    """See `float_files.row`: names, shapes, values, keys and logits."""
    found = float_files.row(family, tmp_path)
    assert "error" not in found
    assert found["logits"] is None or found["logits"] <= 1e-5
    kept = json.loads(float_files.RESULTS.read_text())[family]
    assert [found[k] for k in ("tensors", "packed", "from")] == [kept[k] for k in ("tensors", "packed", "from")]
