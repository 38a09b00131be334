"""Compiles every Triton kernel for GPUs that are not there, and prints one JSON line for each: registers and spills.

Run by test_triton_compile.py in a process of its own, because kernels that the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.reference import ZEROED_SCORE_TINYBERT
from engine.kernels.triton import attention as triton_attention
from engine.kernels.triton import hidden as triton_hidden
from engine.kernels.triton import kl as triton_kl
from engine.kernels.triton.common import FUSED, STAGES, padded_width

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
WIDTHS = ((26, 64), (32, 64), (64, 64), (64, 128))
"""Head widths of student and teacher."""


class Case(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]
    """Of the arguments that are not constants, in any order."""
    constants: dict[str, Any]
    warps: int
    stages: int


def _types(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Pointers are in capitals; strides and counts are integers, scales floats."""
    special = {"STARTS": "*i32", "LENGTHS": "*i32", "MASK": "*u8", "PART": "*fp32", "OUT": "*fp32"}
    special |= {"LSE_S": "*fp32", "LSE_T": "*fp32", "STATES": "*i64", "TARGETS": "*i64", "GRADIENTS": "*i64"}
    found = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in special:
            found[name] = special[name]
        elif name.isupper():
            found[name] = f"*{dtype}"
        else:
            found[name] = "fp32" if name.startswith("scale") else "i32"
    return found


def cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp16"):
        exact = {"PRECISION": "ieee", "WIDEN": False}
        for width_s, width_t in WIDTHS:
            widths = {
                "WIDTH_S": width_s,
                "WIDTH_T": width_t,
                "BLOCK_S": padded_width(width_s),
                "BLOCK_T": padded_width(width_t),
            }
            for tinybert, windowed in ((False, False), (True, False), (False, True), (True, True)):
                shared = {
                    "H": 12,
                    "TINYBERT": tinybert,
                    "WINDOWED": windowed,
                    "CUT": ZEROED_SCORE_TINYBERT,
                    "GRADIENT": True,
                    **widths,
                    **exact,
                }
                constants = {
                    **shared,
                    "BLOCK_L": triton_attention.ONE_PROGRAM,
                    "MASKED": True,
                    "BN": triton_attention.columns_of(width_t),
                }
                if not (tinybert and width_t > 64):
                    yield case("score, whole", triton_attention._whole, dtype, constants, triton_attention.WARPS)
                constants = {
                    **shared,
                    "BM": triton_attention.ROWS,
                    "BN": triton_attention.columns_of(width_t),
                    "OWN_MASKED": True,
                    "OTHER_MASKED": True,
                    "SUMS": True,
                }
                yield case("score, by rows", triton_attention._by_rows, dtype, constants, triton_attention.WARPS)
            for windowed in (False, True):
                blocks = {
                    "H": 12,
                    "BM": triton_kl.ROWS,
                    "BN": triton_kl.COLUMNS,
                    "MASKED": True,
                    "WINDOWED": windowed,
                    **exact,
                }
                one = {"WIDTH": width_t, "BLOCK": padded_width(width_t), "LOW": triton_kl.LOWEST}
                both = {**blocks, **widths}
                warps = triton_kl.warps_of(width_t)
                yield case("KL, log sums", triton_kl._log_sums, dtype, {**blocks, **one}, warps)
                yield case("KL, by queries", triton_kl._by_queries, dtype, {**both, "GRADIENT": True}, warps)
                yield case("KL, by keys", triton_kl._by_keys, dtype, both, warps)
        constants = {
            "WIDTH": 768,
            "S_TYPE": TYPES[dtype],
            "T_TYPE": tl.bfloat16,
            "G_TYPE": TYPES[dtype],
            "MASKED": True,
            "GRADIENT": True,
            "BLOCK": triton_hidden.BLOCK,
            "BLOCKS_EACH": triton_hidden.BLOCKS_EACH,
        }
        yield case("hidden states", triton_hidden._squares, dtype, constants, 4)


def case(name: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int) -> Case:
    widths = "/".join(str(constants[key]) for key in ("WIDTH_S", "WIDTH_T", "WIDTH") if key in constants)
    kind = "".join(f" {name.lower()}" for name in ("TINYBERT", "WINDOWED") if constants.get(name))
    return Case(
        f"{name} {dtype} {widths}{kind}",
        kernel,
        _types(kernel, dtype, constants),
        constants,
        warps,
        1 if "whole" in name else STAGES,
    )


def compile_for(one: Case, capability: int) -> dict[str, Any]:
    """Registers per thread, spilled bytes and shared memory."""
    signature = {**one.types, **dict.fromkeys(one.constants, "constexpr")}
    names = one.kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in one.types.items() if kind[0] == "*"}
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=one.constants, attrs=aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": one.warps, "num_stages": one.stages, **FUSED},
    )
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"  # the newest there
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = "sm_90a" if capability == 90 else f"sm_{capability}"
        words = [str(assembler), "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    said = done.stderr + done.stdout
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    return {
        "kernel": one.name,
        "sm": capability,
        "registers": registers,
        "spills": spills,
        "shared": made.metadata.shared,
    }


if __name__ == "__main__":
    for one in cases():
        for capability in (80, 90):
            print(json.dumps(compile_for(one, capability)), flush=True)
    sys.exit(0)
