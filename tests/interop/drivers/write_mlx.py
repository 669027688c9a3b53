"""Quantize a float checkpoint with mlx-lm, round to nearest.

    python write_mlx.py SRC DST BITS GROUP_SIZE

The embedding and the head are quantized too, as mlx-lm does.
"""

import sys

from mlx_lm import convert


def main(src: str, dst: str, bits: str, group: str) -> None:
    convert(src, mlx_path=dst, quantize=True, q_bits=int(bits), q_group_size=int(group))


if __name__ == "__main__":
    main(*sys.argv[1:])
