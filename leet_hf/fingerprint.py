"""Telling one model from another: digests of its config, of its weights' shapes, and of a sample of their values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from .slots import stored_tensor

WEIGHTS, VALUES = 24, 32  # how many weights are looked at, and how many values of each
# What a config says about how a model is run or where it came from, not about what it computes.
_IMMATERIAL = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "name_or_path", "pad_token_id",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(base: Any) -> dict[str, str]:
    """Digests of a base model: "config", "shapes" (names, shapes and dtypes of all weights), "weights" (some values).

    Cheap: a few hundred numbers are read. Two models that differ in training differ in
    "weights" with all but certainty, as training changes every weight.
    """
    weights = _weights(base)
    shapes = [[name, str(tensor.dtype), *tensor.shape] for name, tensor in weights]
    stride = max(1, len(weights) // WEIGHTS)
    chosen = [tensor for _, tensor in weights[::stride]]
    return {
        "config": _digest(json.dumps(_material(base.config.to_dict()), sort_keys=True, default=str).encode()),
        "shapes": _digest(json.dumps(shapes).encode()),
        "weights": _digest(_sampled(chosen)),
    }


def _weights(base: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters with their names; those accelerate has moved out, from where it keeps them."""
    found = []
    for path, module in base.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            found.append((f"{path}.{name}" if path else name, stored_tensor(module, name)))
    return found


def _material(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in config.items() if key not in _IMMATERIAL and not key.startswith(("_", "output_"))
    }


@torch.no_grad()
def _sampled(tensors: list[Tensor]) -> bytes:
    """Bytes of values spread evenly over each tensor, whatever device it is on."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(VALUES, flat.numel()), dtype=torch.float64).long()
        parts.append(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return b"".join(parts)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
