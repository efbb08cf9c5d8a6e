"""Argument checks: every error names the argument, what it was, what it must be and what to do.

Shapes, dtypes and devices are compared always: attributes only, so nothing waits for a device and torch.compile can
trace it. Values are looked at on CPU tensors always, on other devices only under the environment variable
LEET_CHECK_VALUES=1, never while tracing.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import NoReturn

import torch
from torch import Tensor

from .shapes import sequence_count, state_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 512
# Arguments that passed: mostly shape, dtype and device are checked, and calls repeat. Checking takes 30 us.
PASSED: set[tuple[object, ...]] = set()
REMEMBERED = 4096
_FEW = 64
TOKEN_SHAPES = {"q": "[B, T, Hq, K]", "k": "[B, T, Hk, K]", "v": "[B, T, Hv, V]"}


def check_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError, or TypeError for what is no tensor, unless `linear_attention` can take these arguments."""
    key = _metadata(q, k, v, log_decay, initial_state, cu_seqlens)
    if key is not None:
        key = (*key, type(scale))
        if key in PASSED:
            return
    check_query(q, scale)
    _check_tokens("k", k, q.shape, q.dtype, q.device)
    _check_tokens("v", v, q.shape, q.dtype, q.device)
    if log_decay is not None:
        check_log_decay(log_decay, q)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    if initial_state is not None:
        check_tensor("initial_state", initial_state)
    heads = state_heads(
        q, k, v, log_decay, initial_state if initial_state is not None and initial_state.dim() == 4 else None
    )
    _check_heads(heads, q, k, v, log_decay)
    if initial_state is not None:
        sequences = sequence_count(q, cu_seqlens)
        rows = "B" if cu_seqlens is None else "N"
        wanted = (sequences, heads, k.shape[-1], v.shape[-1])
        _check_state("initial_state", initial_state, wanted, f"[{rows}, H, K, V]", q)
    remember(key)


def remember(key: tuple[object, ...] | None) -> None:
    """Note that arguments of this key have passed; None: they are to be checked again."""
    if key is not None:
        if len(PASSED) >= REMEMBERED:
            PASSED.clear()
        PASSED.add(key)


def looks_at_values(x: Tensor) -> bool:
    """Whether values of `x` may be read now: it holds real numbers, and waiting for its device is free or asked for."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta":
        return False
    return x.device.type == "cpu" or os.environ.get("LEET_CHECK_VALUES") == "1"


def _metadata(*arguments: Tensor | None) -> tuple[object, ...] | None:
    """All that is checked of plain tensors whose values are not looked at, or None where there is more to check."""
    if torch.compiler.is_compiling():
        return None
    seen: list[object] = []
    for x in arguments:
        if x is None:
            seen.append(None)
        elif type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda:
            seen += (x.shape, x.dtype, x.device)
        else:
            return None
    return None if os.environ.get("LEET_CHECK_VALUES") == "1" else tuple(seen)


def fail(name: str, was: str, must: str, remedy: str) -> NoReturn:
    raise ValueError(f"{name} {was}, must be {must}: {remedy}")


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, must be a torch.Tensor: convert it with torch.as_tensor")


def check_query(q: Tensor, scale: float) -> None:
    check_tensor("q", q)
    if q.dim() != 4:
        fail(
            "q", f"has shape {list(q.shape)}", "[B, T, Hq, K]", "add the missing dimensions (tokens come before heads)"
        )
    if q.dtype not in DTYPES:
        fail("q", f"is {q.dtype}", "float32, bfloat16, float16 or float64", "convert q, k and v")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        fail("q", f"has key dim K={q.shape[3]}", f"1 to {MAX_HEAD_DIM}", "split the heads into smaller ones")
    if q.shape[2] < 1:
        fail("q", "has 0 heads", "at least 1", "give it a head")
    if isinstance(scale, bool) or not isinstance(scale, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale is a {type(scale).__name__}, must be a number: pass a float")


def _check_tokens(name: str, x: Tensor, like: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, x)
    if x.dim() != 4 or x.shape[0] != like[0] or x.shape[1] != like[1]:
        was, shape = f"has shape {list(x.shape)}", TOKEN_SHAPES[name]
        fail(
            name,
            was,
            f"{shape} with q's B={like[0]}, T={like[1]}",
            "give q, k and v the same batch and tokens (tokens before heads)",
        )
    if name == "k" and x.shape[3] != like[3]:
        fail(name, f"has key dim K={x.shape[3]}", f"q's K={like[3]}", "q and k must come from projections of one width")
    if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
        fail(name, f"has head dim {x.shape[3]}", f"1 to {MAX_HEAD_DIM}", "split the heads into smaller ones")
    if x.shape[2] < 1:
        fail(name, "has 0 heads", "at least 1", "give it a head")
    if x.dtype != dtype:
        fail(name, f"is {x.dtype}", f"q's dtype {dtype}", "convert q, k and v to one dtype")
    if x.device != device:
        fail(name, f"is on {x.device}", f"q's device {device}", "move all arguments to one device")


def _check_heads(heads: int, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    counts = [("q", q.shape[2]), ("k", k.shape[2]), ("v", v.shape[2])]
    if log_decay is not None:
        counts.append(("log_decay", log_decay.shape[-1]))
    for name, count in counts:
        if heads % count:
            fail(
                name,
                f"has {count} heads",
                f"a number that divides H={heads}, the most heads of any argument",
                "repeat or drop heads",
            )


def check_log_decay(log_decay: Tensor, tokens: Tensor) -> None:
    check_tensor("log_decay", log_decay)
    batch, length = tokens.shape[:2]
    shape = log_decay.shape
    if log_decay.dim() not in (1, 3) or (log_decay.dim() == 3 and (shape[0] != batch or shape[1] != length)):
        remedy = "give one number per head, or one per token and head"
        fail("log_decay", f"has shape {list(shape)}", f"[H] or [B, T, H] = [{batch}, {length}, H]", remedy)
    if shape[-1] < 1:
        fail("log_decay", "has 0 heads", "at least 1", "pass None for no decay")
    wanted = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if log_decay.dtype != wanted:
        remedy = f"compute it in {wanted}; a rounded decay is a different decay"
        fail("log_decay", f"is {log_decay.dtype}", f"{wanted} for {tokens.dtype} tokens", remedy)
    if log_decay.device != tokens.device:
        fail(
            "log_decay",
            f"is on {log_decay.device}",
            f"the tokens' device {tokens.device}",
            "move it there once, ahead of the call",
        )
    check_values_of(log_decay)


def check_values_of(log_decay: Tensor) -> None:
    if looks_at_values(log_decay) and not _few_and_good(log_decay):
        low, high = (x.item() for x in log_decay.detach().aminmax())
        if not (high <= 0 and low > float("-inf")):
            was = "holds NaN" if high != high else f"holds {high if high > 0 else low}"
            fail(
                "log_decay",
                was,
                "finite and <= 0 everywhere",
                "it is the natural log of a decay in (0, 1]; -104 already forgets everything",
            )


def _few_and_good(log_decay: Tensor) -> bool:
    """Whether these are few numbers on a CPU, where reading them takes less time than a reduction, and all are good."""
    if log_decay.device.type != "cpu" or log_decay.numel() > _FEW:
        return log_decay.numel() == 0
    return all(-math.inf < x <= 0 for x in log_decay.flatten().tolist())


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    batch, tokens = q.shape[:2]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        fail(
            "cu_seqlens",
            f"has shape {list(cu_seqlens.shape)}",
            "[N + 1] with N >= 1 sequences",
            "give the N + 1 bounds of N sequences",
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail("cu_seqlens", f"is {cu_seqlens.dtype}", "int32 or int64", "convert it")
    if batch != 1:
        fail("q", f"has batch size {batch}", "1 with cu_seqlens", "pack every sequence into one row")
    if cu_seqlens.device != q.device:
        fail(
            "cu_seqlens",
            f"is on {cu_seqlens.device}",
            f"q's device {q.device}",
            "move it there once, ahead of the call",
        )
    if looks_at_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        remedy = "sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1]"
        if bounds[0] != 0:
            fail("cu_seqlens", f"starts at {bounds[0]}", "0 at the start", remedy)
        if bounds[-1] != tokens:
            fail("cu_seqlens", f"ends at {bounds[-1]}", f"T={tokens} at the end", remedy)
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end < begin:
                fail("cu_seqlens", f"goes down from {begin} to {end} at entry {n + 1}", "non-decreasing", remedy)


def _check_state(name: str, state: Tensor, wanted: tuple[int, ...], form: str, q: Tensor) -> None:
    if tuple(state.shape) != wanted:
        remedy = "pass the final state of a call with the same heads and dims, one per sequence"
        fail(name, f"has shape {list(state.shape)}", f"{form} = {list(wanted)}", remedy)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.dtype != dtype:
        fail(
            name,
            f"is {state.dtype}",
            f"{dtype} for {q.dtype} inputs",
            "keep states in that dtype; rounding them loses the past",
        )
    if state.device != q.device:
        fail(name, f"is on {state.device}", f"q's device {q.device}", "move it there")
