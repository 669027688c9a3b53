"""Every family in AWQ's consumers: its logits there are ours, or the program refuses it as `REFUSED` says.

The families are read in one go by each program, so pieces (``-k mixtral``) cost little less than all of them.
"""

from __future__ import annotations

from typing import Any

import consumers
import peers
import pytest
from consumers import CONSUMERS, DIFFERS, NAMES, REFUSED, agrees

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `consumers.run`, for the families that this session tests."""
    for consumer in CONSUMERS.values():
        peers.environment(consumer.environment)
    here = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.params["family"] for item in here if isinstance(item, pytest.Function)}
    return consumers.run(sorted(chosen), tmp_path_factory.mktemp("consumers"))


@pytest.mark.parametrize("family", NAMES)
def test_its_logits_are_ours(family: str, results: dict[str, Any]) -> None:
    assert results[family]
    for name, found in results[family].items():
        refusal = REFUSED.get((family, name))
        print(family, name, found, refusal)
        if (family, name) in DIFFERS:
            assert "difference" in found, (name, found)
            assert not agrees(found, name), f"{name} agrees on {family} now: update DIFFERS"
        elif refusal is None:
            assert agrees(found, name), (name, found)
        else:
            assert refusal in found.get("error", ""), f"{name} no longer refuses {family} like that: update REFUSED"
