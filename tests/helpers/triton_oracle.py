"""Runs the Triton kernels in Triton's interpreter and compares them with NumPy in float64; a process of its own.

``TRITON_INTERPRET=1 python tests/helpers/triton_oracle.py KERNELS.py`` reads cases as JSON on stdin and prints their
errors. The variable must be set before triton is imported, and the kernels cannot then be compiled. It packs
with NumPy, from the description in `awq_jax.pack`, and imports nothing of awq_jax.
"""

import importlib.util
import json
import sys

import numpy as np


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint16 ``[B, N, W]`` of codes ``[B, K, N]``."""
    count = 16 // bits
    b, k, n = codes.shape
    runs = -(-k // (32 * count))
    full = np.zeros((b, runs * 32 * count, n), np.uint32)
    full[:, :k] = codes
    planes = full.reshape(b, runs, count, 32, n)
    words = sum(planes[:, :, i] << (bits * i) for i in range(count))
    return np.ascontiguousarray(words.reshape(b, runs * 32, n).transpose(0, 2, 1)).astype(np.uint16)


def run(kernels, torch, case: dict) -> dict:
    """Relative error of one case, and whether every element was written."""
    b, m, k, n, bits, split = (case[key] for key in ("b", "m", "k", "n", "bits", "split"))
    g = k if case["g"] == -1 else case["g"]
    groups, dtype = -(-k // g), getattr(torch, case["dtype"])
    rng = np.random.default_rng(case["seed"])
    codes = rng.integers(0, 2**bits, (b, groups * g, n))
    zeros = rng.integers(0, 2**bits, (b, groups, n)) if case["zeros"] else np.full((b, groups, n), 2 ** (bits - 1))
    scales = torch.tensor(rng.random((b, groups, n)) * 0.02 + 0.005).to(dtype)
    x = torch.tensor(rng.standard_normal((b, m, k))).to(dtype)
    bias = torch.tensor(rng.standard_normal(n)).to(dtype)
    spread = [np.repeat(a, g, 1) for a in (zeros, scales.double().numpy())]
    want = x.double().numpy() @ ((codes - spread[0]) * spread[1])[:, :k]
    if case["bias"]:
        want = want + bias.double().numpy()
    words = torch.from_numpy(packed(codes, bits))
    if case["damage"]:  # one code of the first column
        words[0, 0, 0] ^= 1
    if case["kernel"] == "dequantize":
        w = torch.full((b, n, k), float("nan"), dtype=dtype)
        runs = -(-k // (32 * (16 // bits)))
        kernels.dequantize[(-(-n // case["bn"]), -(-runs // split), b)](
            words, scales, torch.tensor(zeros).to(torch.uint8), w, N=n, K=k, GROUPS=groups, GROUP_PLANES=g // 32,
            BITS=bits, ZEROS=case["zeros"], PER=split, BN=case["bn"], ASM=False,
        )  # fmt: skip
        exact = ((codes - spread[0]) * spread[1])[:, :k].transpose(0, 2, 1)
        far = np.abs(w.double().numpy() - exact).max() / np.abs(exact).max()
        return {"written": bool(np.isfinite(w.numpy()).all()), "error": float(far)}
    y = torch.full((b * split, m, n), float("nan"), dtype=torch.float32)
    constants = {
        "N": n, "K": k, "GROUPS": groups, "GROUP_PLANES": g // 32, "BITS": bits, "ZEROS": case["zeros"],
        "BIAS": case["bias"], "SPLIT": split, "BN": case["bn"], "ASM": False,
    }  # fmt: skip
    rows = case["bm"] if case["kernel"] == "mma" else 1
    if case["kernel"] == "mma":
        constants |= {"BM": rows, "LATE": case["late"]}
    grid = (-(-m // rows), -(-n // case["bn"]), b * split)
    getattr(kernels, case["kernel"])[grid](
        x, words, scales, torch.tensor(zeros).to(torch.uint8), bias, m, y, **constants
    )
    got = y.numpy().astype(np.float64).reshape(b, split, m, n).sum(1)
    return {
        "written": bool(np.isfinite(y.numpy()).all()),
        "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
    }


def main() -> None:
    import torch
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)  # its __index__ calls int() on an array of one element, which NumPy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    spec = importlib.util.spec_from_file_location("kernels_under_test", sys.argv[1])
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    print(json.dumps([run(kernels, torch, case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
