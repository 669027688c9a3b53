"""Quantize a checkpoint with AutoAWQ 0.2.9, for ``vs_peers.py``; runs in AutoAWQ's own environment.

    python autoawq_quantize.py MODEL_DIR TOKENS.npy OUT_DIR --group-size 64 --dtype bfloat16

Imports nothing of awq_jax. One defect has to be worked around to get a usable result on a CPU: the scale
search keeps ``{k: v.cpu() for k, v in module.state_dict().items()}`` to restore the weights after each
trial ratio. On a GPU ``.cpu()`` copies; on a CPU it returns the live tensors, so the in-place scaling of
the first trial also scales the "backup", and every later trial and the final weights are corrupt.
"""

from typing import Any
from unittest import mock

import arguments
import numpy as np
import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer


class SafeRestore(AwqQuantizer):
    """The stock quantizer, with a backup of the weights that does not share their memory."""

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *rest: Any, **kw: Any
    ) -> torch.Tensor:
        copied = {name: tensor.clone() for name, tensor in module2inspect.state_dict().items()}
        # The search asks once, before its first trial; afterwards the class's own method is there again.
        with mock.patch.object(module2inspect, "state_dict", return_value=copied):
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest, **kw)


class NoSearch(AwqQuantizer):
    """All scales one: for what the rest of the work needs."""

    def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: torch.Tensor, *rest: Any, **kw: Any) -> torch.Tensor:
        return torch.ones(x_mean.numel())


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", help="of the float weights and the search")
    parser.add_argument("--no-search", action="store_true", help="neither scales nor clipping: what the rest costs")
    args = parser.parse_args()

    rows = np.load(args.tokens).tolist()
    model = AutoAWQForCausalLM.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype), device_map="cpu")
    model.quantize(
        tokenizer=None,
        quant_config={"zero_point": True, "q_group_size": args.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=len(rows[0]),
        quantizer_cls=NoSearch if args.no_search else SafeRestore,
        apply_clip=not args.no_search,
    )
    model.save_quantized(args.out)


if __name__ == "__main__":
    main()
