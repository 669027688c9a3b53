"""Writes docs/models.md from what discovery finds in the tiny model of every family.

python docs/_build/model_table.py            # write it
python docs/_build/model_table.py --check    # exit with 1 if it is not current
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))  # when run as a program

import family_cases
import jax
import multimodal
import numpy as np
import peer_mappings
import torch_references
from flax import nnx
from transformers import AutoConfig

import awq_jax
from awq_jax import models
from awq_jax.cli import quantizable
from awq_jax.models.families import FAMILIES
from awq_jax.models.weights import params
from awq_jax.plan.plan import ScaleGroup, Plan

PAGE = Path(__file__).parents[1] / "models.md"
HEADER = """# Model families

`awq_jax.models.supported()` lists the values of `model_type` in `config.json` that the reference decoder reads, and
`awq-jax inspect HUB_OR_DIR` says of a checkpoint whether it is one of them and how it would be scaled. Of Llama,
Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1 to 3, Phi-3, StarCoder2, Granite, OLMo 2 and 3, and Command R, GGUF files are
read too.
[Adding a family](extending/family.md) takes one short function. Any other Flax model needs none:
`awq_jax.calibrate(apply_fn, params, batches)` and `awq_jax.quantize(params, calib)` take it as it is.

Nobody wrote the groups below down: they are what `awq_jax.discover` finds in each family's forward pass, and a test
proves each of them by folding random scales. `q k v <- input_layernorm` reads: these linears share their input, and the
scale that AWQ gives its channels is divided out of that norm. Linears under "not scaled" are quantized too, with their
input as it is (or with a scale that is stored beside them: `explicit_scale=True`). Routers and shared experts' gates
stay float, and so does what looks at images or hears: it is run with the decoder, or carried through as it is where the
table says so.

The last column compares with the tables that AutoAWQ 0.2.9 and llm-compressor 0.14 hold for the family (as written down
in `tests/helpers/peer_mappings.py`; a dash: they have none of its name). "Also" is what is scaled, or scaled along,
here alone: routers most of all, without which a scale in the norm before them changes which experts a token goes to.
AutoAWQ leaves out `o <- v` where key/value heads are fewer than query heads; here the query heads of one key/value head
share their scales. "Not" is what a peer has and we have not:
{explained}

Which programs read what is written of each family, and how near their logits are:
[consumers.md](../benchmarks/results/consumers.md).

This page is generated: `python docs/_build/model_table.py` (`--check` tells whether it is current).

| `model_type` | what it is | groups and what absorbs their scale | not scaled, and why | compared with the peers |
|---|---|---|---|---|
"""


def plan_of(case: family_cases.Case | multimodal.Case) -> Plan:
    """What discovery finds in a case's model, from shapes alone."""
    if isinstance(case, multimodal.Case):
        hf = multimodal.config_of(case)
    else:
        hf = family_cases.config_of(case) | {"model_type": case.family}
        if case.family not in torch_references.MODELS:
            hf = AutoConfig.for_model(**hf).to_dict()
    graphdef, state = params.abstract(models.config_from_hf(hf))
    return awq_jax.discover(lambda p, t: nnx.merge(graphdef, p)(t), state, jax.ShapeDtypeStruct((1, 4), np.int32))


@functools.cache
def groups_of(family: str) -> list[ScaleGroup]:
    """The groups of all cases of a family, within layers."""
    cases = [c for c in (*family_cases.CASES, *multimodal.CASES, *multimodal.CARRIED) if c.family == family]
    return [g for c in cases for g in plan_of(c).groups if g.name.startswith("layers/")]


def page() -> str:
    """The whole of docs/models.md."""
    rows = []
    for family in sorted(FAMILIES):
        about = (sys.modules[FAMILIES[family].__module__].__doc__ or "").splitlines()[0].rstrip(".")
        scaled, rest = quantizable.rows(groups_of(family))
        cells = (
            f"`{family}`",
            about,
            "; ".join(scaled),
            "; ".join(rest) or "-",
            peer_mappings.compared(family, scaled),
        )
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    explained = "\n".join(f"- `{what}`: {why}." for what, why in peer_mappings.EXPLAINED.items())
    return HEADER.format(explained=explained) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
