"""Compiles the Triton kernels for GPUs that are not here, and reads the machine code."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from awq_jax.kernels import triton_kernels

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one program may have (CUDA programming guide)
POINTERS = ("x_ptr", "q_ptr", "s_ptr", "z_ptr", "b_ptr", "y_ptr")


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel.

    Attributes:
      loop: opcodes of its main loop, with their modifiers.
      all: opcodes of the whole kernel.
      registers, stack, shared: per thread, bytes per thread, bytes per program.
      threads: per program.
    """

    loop: tuple[str, ...]
    all: tuple[str, ...]
    registers: int
    stack: int
    shared: int
    threads: int

    def count(self, *families: str) -> int:
        """Instructions of the loop whose opcode begins with one of ``families``."""
        return sum(op.startswith(families) for op in self.loop)

    def families(self) -> Counter[str]:
        return Counter(op.split(".")[0] for op in self.all)


def compiled(
    folder: Path, sm: int, kernel: str, *, bm: int = 16, bn: int = 128, warps: int = 4, stages: int = 4,
    late: bool = True, split: int = 4, bits: int = 4, g: int = 128, k: int = 4096, n: int = 4096,
    dtype: str = "bf16", zeros: bool = True, asm: bool = True, function=None,
) -> Code:  # fmt: skip
    """Compile for compute capability ``sm / 10``."""
    function = function or getattr(triton_kernels, kernel)
    result = "fp32" if split > 1 else dtype
    types = (dtype, "u16", dtype, "u8", dtype, result)
    signature = {name: f"*{t}" for name, t in zip(POINTERS, types, strict=True)} | {"M": "i32"}
    constants = {
        "N": n, "K": k, "GROUPS": -(-k // g), "GROUP_PLANES": g // 32, "BITS": bits, "ZEROS": zeros, "BIAS": False,
        "SPLIT": split, "BN": bn, "ASM": asm,
    }  # fmt: skip
    if kernel == "mma":
        constants |= {"BM": bm, "LATE": late}
    if kernel == "dequantize":
        signature = {"q_ptr": "*u16", "s_ptr": f"*{dtype}", "z_ptr": "*u8", "w_ptr": f"*{dtype}"}
        constants = {key: constants[key] for key in constants if key not in ("BIAS", "SPLIT")} | {"PER": split}
    at = {name: (function.arg_names.index(name),) for name in (*signature, *constants)}
    source = ASTSource(
        function,
        signature | dict.fromkeys(constants, "constexpr"),
        {at[name]: value for name, value in constants.items()},
        {at[name]: [["tt.divisibility", 16]] for name in signature if name != "M"},
    )
    built = triton.compile(source, GPUTarget("cuda", sm, 32), {"num_warps": warps, "num_stages": stages})
    path = folder / f"{kernel}_{sm}.cubin"
    path.write_bytes(built.asm["cubin"])
    usage = _tool("--dump-resource-usage", path)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    code = [
        (int(address, 16), op, rest)
        for address, op, rest in re.findall(
            r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", _tool("--dump-sass", path)
        )
    ]
    return Code(
        max(_loops(code), key=len, default=()), tuple(op for _, op, _ in code), registers, stack,
        built.metadata.shared, warps * 32,
    )  # fmt: skip


def _loops(code):
    """Opcodes between each backward branch and its target."""
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            yield tuple(o for a, o, _ in code if int(target[1], 16) <= a <= address)


def _tool(option: str, path: Path) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
