"""NVIDIA Apex, where it can be used. The package `apex` on PyPI is something else; Apex is only built from source."""

from __future__ import annotations

import importlib
import importlib.util

from engine.errors import UserError

BUILD = (
    "build it from source: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def probe_apex() -> tuple[bool, str]:
    """Returns (usable, reason). Looks for `apex.multi_tensor_apply`, which only NVIDIA's Apex has. Asks no GPU."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, f"NVIDIA Apex is not installed; {BUILD}"
    where = spec.origin or ", ".join(spec.submodule_search_locations or ["?"])
    try:
        found = importlib.util.find_spec("apex.multi_tensor_apply")  # runs apex/__init__.py
    except Exception as error:  # the impostor fails in many ways while it is imported
        found, where = None, f"{where}, which fails with {type(error).__name__}: {error}"
    if found is None:
        return False, (
            f"the installed package `apex` ({where}) is not NVIDIA Apex: it has no apex.multi_tensor_apply (the `apex` "
            f"on PyPI is an unrelated project); pip uninstall apex, then {BUILD}"
        )
    try:
        importlib.import_module("apex.multi_tensor_apply")
    except ImportError as error:
        return False, f"NVIDIA Apex ({where}) cannot be imported: {error}; {BUILD}"
    return True, f"NVIDIA Apex from {where}"


def probe_fused_layer_norm() -> tuple[bool, str]:
    """Returns (usable, reason) for apex.normalization.FusedLayerNorm, which needs a compiled extension even on a
    CPU."""
    usable, reason = probe_apex()
    if usable and importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return False, f"{reason} was built without its CUDA extensions (fused_layer_norm_cuda); {BUILD}"
    return usable, reason


def require_apex(optimizer: str) -> None:
    """Raises UserError when `optim.name` asks for NVIDIA Apex and it cannot be used."""
    usable, why_not = probe_apex()
    if not usable:
        raise UserError(f"optim.name={optimizer!r}: {why_not}")


def require_fused_layer_norm() -> None:
    """Raises UserError when `student.fused_layer_norm` asks for NVIDIA Apex and it cannot be used."""
    usable, why_not = probe_fused_layer_norm()
    if not usable:
        raise UserError(f"student.fused_layer_norm=true: {why_not}; or set it to false")
