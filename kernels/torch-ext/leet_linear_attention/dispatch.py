"""Which method computes a call: ordered candidates, each of which says why it can not serve."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .interpreter import interpreting
from .methods import NAMES


@dataclass(frozen=True)
class Method:
    """An algorithm for the operator: its name, and why it refuses a device and dtype (None where it serves)."""

    name: str
    refuses: Callable[[torch.device, torch.dtype], str | None]


# Looked up once, here, because torch.compile does not trace the looking up.
_TRITON_MISSING = (
    "the package triton is not installed (it exists for Linux; pip install triton)"
    if importlib.util.find_spec("triton") is None
    else None
)


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if _TRITON_MISSING is not None:
        return _TRITON_MISSING
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype} is not one of float32, bfloat16, float16"
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        if interpreting():
            return None
        return "tensors are on the CPU (only Triton's interpreter runs there: TRITON_INTERPRET=1)"
    return f"device type {device.type!r} is not 'cuda'"


def _torch_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype} is not one of float64, float32, bfloat16, float16"
    if device.type == "mps":
        return "device type 'mps' has no float64, which sums of decays are taken in"
    return None


_METHODS = {
    "triton": Method("triton", _triton_refuses),
    "torch": Method("torch", _torch_refuses),
    # For study and comparison: served when asked for by name, never by "auto".
    **{name: Method(name, _triton_refuses if name.endswith("_triton") else _torch_refuses) for name in NAMES},
}


def candidates(device: torch.device) -> list[Method]:
    """Methods in the order ``"auto"`` tries them; on a CPU torch first, as the interpreter is for checking kernels."""
    order = ["torch", "triton"] if device.type == "cpu" else ["triton", "torch"]
    return [_METHODS[name] for name in order]


def choose(method: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the method that serves this call.

    Raises:
        ValueError: ``method`` is unknown or can not serve; the message lists every candidate's reason.
    """
    if method == "auto":
        reasons = []
        for candidate in candidates(device):
            reason = candidate.refuses(device, dtype)
            if reason is None:
                return candidate.name
            reasons.append(f"  {candidate.name}: {reason}")
        raise ValueError("no method of linear_attention can serve this call:\n" + "\n".join(reasons))
    if method not in _METHODS:
        raise ValueError(f"method was {method!r}, must be 'auto' or one of {sorted(_METHODS)}")
    reason = _METHODS[method].refuses(device, dtype)
    if reason is not None:
        raise ValueError(f"method {method!r} can not serve this call: {reason}. Use method='auto'")
    return method


def available_methods(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """Every method: None where it runs on ``device`` (default: CUDA if there is one, else CPU), or why it can not.

    First those that ``"auto"`` tries, in its order, then the named algorithms of the collection (see ``methods``).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    named = [_METHODS[name] for name in NAMES]
    return {method.name: method.refuses(device, dtype) for method in [*candidates(device), *named]}
