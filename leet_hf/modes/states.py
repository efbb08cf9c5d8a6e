"""How far the recurrent states of a decoding model are from the recurrence done in float64 on the same inputs."""

from __future__ import annotations

from typing import Any

import torch

from ..versions import CACHE, cache_of


def state_error(model: Any, tokens: list[int]) -> float:
    """Decode `tokens` one by one, then compare every recurrent state. Returns the largest error over the layers.

    The inputs (keys and values) are those the model itself computed, in its own dtype, so that the error is of the
    decays and of the state alone: RMS of the difference / RMS of the float64 state.
    """
    projected: dict[int, list[torch.Tensor]] = {
        i: [] for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"
    }
    hooks = [_record(model.base_model.layers[i].self_attn.qkv_proj, rows) for i, rows in projected.items()]
    cache = None
    try:
        for token in tokens:
            ids = torch.tensor([[token]], device=model.device)
            cache = cache_of(model(input_ids=ids, **{CACHE: cache}, use_cache=True))
    finally:
        for hook in hooks:
            hook.remove()
    return max(_error(model, i, torch.cat(rows), _state(cache, i)) for i, rows in projected.items())


def _record(module: torch.nn.Module, rows: list[torch.Tensor]) -> Any:
    return module.register_forward_hook(lambda module, inputs, output: rows.append(output[0]))


def _error(model: Any, layer: int, projected: torch.Tensor, state: torch.Tensor) -> float:
    """projected: [T, 3 * H * D], the packed projection of one sequence; state: [1, H, D, D]."""
    attention = model.base_model.layers[layer].self_attn
    heads = model.config.num_attention_heads
    packed = attention.act_fn(projected).double().unflatten(-1, (heads, -1))  # [T, H, q | k | v]
    _, keys, values = packed.chunk(3, dim=-1)
    # MiniMax: slope of head h (from 0) of layer l is 2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)
    depth = 1 - layer / (model.config.num_hidden_layers - 1 + 1e-5) + 1e-5
    slopes = depth * 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64, device=keys.device) / heads)
    age = torch.arange(len(keys) - 1, -1, -1, dtype=torch.float64, device=keys.device)  # [T]
    weights = torch.exp(-slopes * age[:, None])  # [T, H]
    want = torch.einsum("th,thk,thv->hkv", weights, keys, values)
    return ((state[0].double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def _state(cache: Any, layer: int) -> torch.Tensor:
    """The state [1, H, K, V] of a layer, from the stock model's own cache or from a standard one."""
    if hasattr(cache, "linear_cache"):
        return cache.linear_cache[layer]
    return cache.layers[layer].recurrent_states[0]
