"""Rounding to nearest in NumPy and float64, and inputs whose channels are correlated."""

import numpy as np


def gram_of(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64).T @ x.astype(np.float64)) / len(x)


def correlated(k: int = 32, tokens: int = 400, seed: int = 1) -> np.ndarray:
    r = np.random.default_rng(seed)
    x = r.normal(size=(tokens, k)) @ (np.eye(k) + 0.4 * r.normal(size=(k, k)))
    return (x * np.exp(r.normal(size=k))).astype(np.float32)


def plain(w: np.ndarray, group: int, bits: int, symmetric: bool) -> np.ndarray:
    """Round to nearest in float64, one group of one column at a time."""
    out = np.zeros_like(w, np.float64)
    top = 2**bits - 1
    for n in range(w.shape[1]):
        for start in range(0, len(w), group):
            part = w[start : start + group, n].astype(np.float64)
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            if symmetric:
                scale = float(np.float16(max(-low, high) / (2 ** (bits - 1) - 0.5)))
                zero = 2 ** (bits - 1)
            else:
                scale = float(np.float16((high - low) / top))
                zero = np.clip(np.rint(-low / scale), 0, top) if scale else 0
            q = np.clip(np.rint(part / scale) + zero, 0, top) if scale else np.full(len(part), zero)
            out[start : start + group, n] = (q - zero) * scale
    return out
