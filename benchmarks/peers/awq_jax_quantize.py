"""Quantize a checkpoint as ``awq_jax.load(...).quantize(...)`` and ``save`` do it for a user, for ``vs_peers.py``.

python awq_jax_quantize.py MODEL_DIR TOKENS.npy OUT_DIR --group-size 64 --method awq+gptq
"""

import argparse

import numpy as np

import awq_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", help="int32 [samples, length]")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", default="awq+gptq")
    args = parser.parse_args()
    tokens = np.load(args.tokens)
    model = awq_jax.load(args.model)
    samples, length = tokens.shape
    settings = {"group_size": args.group_size, "method": args.method}
    model.quantize(tokens, samples=samples, seq_len=length, progress=False, **settings)
    model.save(args.out, format="gemm")


if __name__ == "__main__":
    main()
