"""What a user should do about the calibration data, from the report of a run."""

import logging
import math

from awq_jax.algorithm.methods import METHODS
from awq_jax.calibration import shrinkage
from awq_jax.report import Report

log = logging.getLogger(__name__)


def warn(report: Report) -> list[str]:
    """Log, and return, what there is to say: tokens that are too few, groups that were better off rounded."""
    said = list(filter(None, (_few_tokens(report), _contradicted(report))))
    for line in said:
        log.warning("%s", line)
    return said


def _few_tokens(report: Report) -> str:
    if report.config["shrinkage"] is not None or not METHODS[report.config["method"]].needs_statistics:
        return ""
    few = [r for r in report.layers if r.shrinkage is not None and r.shrinkage >= shrinkage.FEW]
    if not few:
        return ""
    worst = max(few, key=lambda r: r.shrinkage or 0.0)
    wanted = shrinkage.tokens_that_would_do(worst.shrinkage or 0.0, report.tokens)
    step = 10 ** max(0, math.floor(math.log10(wanted)) - 1)
    return (
        f"{report.tokens:,} calibration tokens are few for the inputs of {len(few)} of {len(report.layers)} weights, "
        f"such as {worst.path}: about {math.ceil(wanted / step) * step:,} would do"
    )


def _contradicted(report: Report) -> str:
    worse = [r for r in report.layers if (r.kept_out or 0.0) > (r.kept_out_rtn or math.inf)]
    if not worse:
        return ""
    return (
        f"{len(worse)} of {len(report.layers)} weights are further from the float model than plain rounding on tokens "
        f"that were kept out, such as {worse[0].path}: calibrate on more text, or on text like that of its use"
    )
