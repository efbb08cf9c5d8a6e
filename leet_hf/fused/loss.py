"""The loss of causal language models in pieces of rows: no float32 copy of all logits, nor of their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .route import wants_gradient

# Logits that are float32 at a time: 128 MiB. Fewer would leave a GPU waiting for launches.
PIECE = 1 << 25


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of predicting the next token, as transformers' `ForCausalLMLoss`, of which it takes the place.

    Computed in float32 whatever the logits' dtype, `PIECE` logits at a time. Autograd keeps the logits as they are;
    their gradient is written in their dtype, rounded once. Do not change logits in place before the backward.

    Args:
        logits: [..., T, vocab_size], floating point.
        labels: [..., T] int64, `ignore_index` where there is nothing to predict. Not read if shift_labels are given.
        vocab_size: the last dimension of logits.
        num_items_in_batch: a tensor or number the sum is divided by; None: the number of labels that count.
        shift_labels: [..., T], labels shifted already, so that logits at t predict the label at t.
        kwargs: not read, as in transformers.

    Returns:
        The loss, a float32 scalar. Under torch.compile, under functorch's transforms and for tensor subclasses (sharded
        logits) it is computed by transformers' own, which also refuses what it can not serve.
    """
    targets = None
    if _serves(logits, vocab_size):
        targets = shift_labels
        if targets is None and isinstance(labels, Tensor):
            targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if targets is None or targets.dtype != torch.int64 or targets.numel() * vocab_size != logits.numel():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    rows, targets = logits.reshape(-1, vocab_size), targets.reshape(-1).to(logits.device)
    total = _Summed.apply(rows, targets, ignore_index) if wants_gradient(rows) else _summed(rows, targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def install_loss(model: nn.Module) -> bool:
    """Make `causal_lm_loss` the loss of a model whose loss is transformers' for causal models; whether that was so.

    A model with a loss of its own, by its class, its instance or its config's `loss_type`, is left alone.
    """
    if not isinstance(model, PreTrainedModel) or type(model).loss_function is not PreTrainedModel.loss_function:
        return False
    kind = getattr(model, "loss_type", None)
    if hasattr(model, "_loss_function") or kind is None or LOSS_MAPPING.get(kind) is not ForCausalLMLoss:
        return False
    model.__dict__["_loss_function"] = causal_lm_loss
    return True


def has_loss(model: nn.Module) -> bool:
    """Whether `causal_lm_loss` is a model's loss by `install_loss`."""
    return model.__dict__.get("_loss_function") is causal_lm_loss


def restore_loss(model: nn.Module) -> None:
    """Undo `install_loss`; a loss that was set since stays."""
    if has_loss(model):
        del model.__dict__["_loss_function"]


def _serves(logits: Any, vocab_size: int) -> bool:
    if torch.compiler.is_compiling() or type(logits) not in (Tensor, nn.Parameter):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return logits.is_floating_point() and logits.dim() > 1 and logits.shape[-1] == vocab_size


def _pieces(rows: Tensor) -> list[slice]:
    count = max(1, PIECE // max(1, rows.shape[1]))
    return [slice(first, first + count) for first in range(0, rows.shape[0], count)]


def _summed(rows: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    total: Tensor | None = None
    for piece in _pieces(rows):
        logs = torch.log_softmax(rows[piece], -1, dtype=torch.float32)
        part = F.nll_loss(logs, targets[piece], ignore_index=ignore_index, reduction="sum")
        total = part if total is None else total + part
    return rows.new_zeros((), dtype=torch.float32) if total is None else total


class _Summed(torch.autograd.Function):
    """The sum over rows [N, V] of -log softmax(row)[target], of those whose target counts; its gradient is
    softmax(row) less 1 at the target."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(rows, targets)
        ctx.ignore_index = ignore_index
        return _summed(rows, targets, ignore_index)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Any, ...]:
        rows, targets = ctx.saved_tensors
        counts = targets != ctx.ignore_index
        # Where, not times: the factor is infinite when no label counts, and these gradients are 0 all the same.
        factors = torch.where(counts, dtotal, 0.0)[:, None]
        places = torch.where(counts, targets, 0)[:, None]
        if torch.is_grad_enabled():  # to be differentiated again: the same in functions that can be
            wide = torch.softmax(rows, -1, dtype=torch.float32)
            wide = wide.scatter_add(1, places, wide.new_full((), -1.0).expand(places.shape))
            return (wide * factors).to(rows.dtype), None, None
        drows = torch.empty_like(rows)
        less = factors.new_full((), -1.0).expand(places.shape)
        for piece in _pieces(rows):
            wide = torch.softmax(rows[piece], -1, dtype=torch.float32)
            wide.scatter_add_(1, places[piece], less[piece])
            torch.mul(wide, factors[piece], out=drows[piece])
        return drows, None, None
