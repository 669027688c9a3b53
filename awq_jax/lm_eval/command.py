"""lm-eval's command line with our model in its registry: lm-eval looks for no plug-ins by itself."""

from __future__ import annotations

import importlib.util
import sys

from awq_jax.errors import AwqError

MISSING = "lm-eval is not installed: pip install lm-eval"


def main() -> int:
    """Run lm-eval with the arguments of this process.

    Returns:
      0; 2 for bad input, after a line on stderr. Wrong usage leaves through ``SystemExit(2)``.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:  # some folder of that name, which holds no package
        print(f"awq-jax: error: {MISSING}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    from awq_jax.devices import compile_cache
    from awq_jax.lm_eval import lm  # noqa: F401  (registers the model)

    try:
        with compile_cache.failures_in_one_line(compile_cache.cache_programs()):
            cli_evaluate()
    except AwqError as e:
        print(f"awq-jax: error: {e}", file=sys.stderr)
        return 2
    return 0
