"""Training a patched model: gradients of stock, with checkpointing, packing, padding, adapters and autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

import tiny
from leet_hf import patch_model
from leet_hf.modes.helpers import Side, padded
from leet_hf.modes.placing import with_lora
from leet_hf.modes.truth import relative_error

TOLERANCE = 1e-4
ROWS = tiny.prompts((19, 30, 9))
Gradients = dict[str, torch.Tensor]


@functools.cache
def patched_of(layout: str) -> Any:
    return patch_model(tiny.model(layout)).train()


def stock_of(layout: str) -> Any:
    return tiny.model(layout).train()


def gradients(model: Any, loss: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, Gradients]:
    """The loss and its gradients by parameter name; those of the routers of unused experts may be missing."""
    model.zero_grad(set_to_none=True)
    value = loss(model)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: tuple[torch.Tensor, Gradients], want: tuple[torch.Tensor, Gradients]) -> None:
    assert relative_error(got[0], want[0]) <= TOLERANCE
    assert got[1].keys() == want[1].keys()
    errors = {name: relative_error(got[1][name], gradient) for name, gradient in want[1].items() if gradient.any()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"gradient of {worst} is off by {errors[worst]:.2g}"


def next_token_loss(logits: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Sum of the cross entropies of each row's next tokens; logits [sum of lengths, vocab], row after row."""
    loss = logits.new_zeros(())
    for own, row in zip(logits.split([*map(len, rows)]), rows, strict=True):
        loss = loss + cross_entropy(own[:-1], torch.tensor(row[1:], device=own.device), reduction="sum")
    return loss


def separate(model: Any) -> torch.Tensor:
    """Each row alone, without padding: what padding and packing must come to."""
    logits = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0] for row in ROWS]
    return next_token_loss(torch.cat(logits), ROWS)


def in_batch(model: Any, side: Side = "left", **options: Any) -> torch.Tensor:
    ids, mask = padded(ROWS, side, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
    return next_token_loss(output.logits[mask.bool()], ROWS)


def packed(model: Any, *left_out: str) -> torch.Tensor:
    """As transformers' own collator packs, less the arguments left out."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate([{"input_ids": row} for row in ROWS])
    batch.pop("labels")
    for name in left_out:
        del batch[name]
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return next_token_loss(model(**batch, use_cache=False).logits[0], ROWS)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_gradients_are_those_of_stock(layout: str) -> None:
    assert_same(gradients(patched_of(layout), separate), gradients(stock_of(layout), separate))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_gradients_of_a_padded_batch_are_those_of_separate_rows(side: Side, layout: str) -> None:
    got = gradients(patched_of(layout), lambda model: in_batch(model, side, use_cache=False))
    assert_same(got, gradients(stock_of(layout), separate))


LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize(
    "left_out",
    [(), ("seq_idx",), ("seq_idx", "position_ids"), LENGTHS, (*LENGTHS, "seq_idx")],
    ids=["as-collated", "lengths-and-positions", "lengths", "positions-and-index", "positions"],
)
def test_gradients_of_packed_rows_are_those_of_separate_rows(left_out: tuple[str, ...], layout: str) -> None:
    got = gradients(patched_of(layout), lambda model: packed(model, *left_out))
    assert_same(got, gradients(stock_of(layout), separate))


def test_stock_leaks_across_packed_rows() -> None:
    """What the tests above would show of a model that is not patched."""
    with pytest.raises(AssertionError):
        assert_same(gradients(stock_of("linear-first"), packed), gradients(stock_of("linear-first"), separate))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_gradient_checkpointing(layout: str, reentrant: bool) -> None:
    want = gradients(stock_of(layout), separate)
    model = patch_model(tiny.model(layout)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(gradients(model, separate), want)
    assert_same(gradients(model, in_batch), want)
    assert_same(gradients(model, packed), want)


def test_gradient_checkpointing_enabled_before_patching() -> None:
    model = tiny.model("linear-first").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(patch_model(model), in_batch), gradients(stock_of("linear-first"), separate))


def test_gradients_with_a_cache_asked_for() -> None:
    """A training forward that keeps a cache has the gradients of one that does not."""
    got = gradients(patched_of("linear-first"), lambda model: in_batch(model, use_cache=True))
    assert_same(got, gradients(stock_of("linear-first"), separate))


def test_gradients_of_lora_adapters() -> None:
    pytest.importorskip("peft")
    got = gradients(with_lora(patch_model(tiny.model())), separate)
    want = gradients(with_lora(tiny.model()), separate)
    assert {"qkv_proj", "out_proj", "output_gate", "q_proj"} <= {name.split(".")[-4] for name in want[1]}
    assert_same(got, want)


def test_patching_a_model_that_already_has_adapters() -> None:
    pytest.importorskip("peft")
    got = gradients(patch_model(with_lora(tiny.model())), separate)
    assert_same(got, gradients(with_lora(tiny.model()), separate))


def test_loss_and_router_loss_are_those_of_stock() -> None:
    """The model's own loss, with the load-balancing loss of its experts."""
    ids, mask = padded(ROWS, "left", torch.device("cpu"))
    labels = ids.masked_fill(mask == 0, -100)

    def own_loss(model: Any) -> torch.Tensor:
        arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return model(**arguments, use_cache=False, output_router_logits=True).loss

    got, want = gradients(patched_of("linear-first"), own_loss), gradients(stock_of("linear-first"), own_loss)
    assert_same(got, want)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_autocast_stays_near_float32(layout: str) -> None:
    """All experts are used here: a choice of experts would turn rounding into jumps."""
    model = patch_model(tiny.model(layout, num_experts_per_tok=4)).train()
    want, exact = gradients(model, in_batch)
    with torch.autocast("cpu", torch.bfloat16):
        got, rounded = gradients(model, in_batch)
    assert relative_error(got, want) <= 0.01
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in rounded.values())
    flat, rounded_flat = (torch.cat([g[name].flatten() for name in exact]) for g in (exact, rounded))
    assert relative_error(rounded_flat, flat) <= 0.1


def test_training_lowers_the_loss() -> None:
    """A few steps of an optimizer on a patched model in train mode, then back to decoding with the new weights."""
    model = patch_model(tiny.model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        losses.append(float(gradients(model, in_batch)[0]))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    row = torch.tensor([ROWS[0]])
    with torch.no_grad():
        cached = model.generate(row, max_new_tokens=20, do_sample=False)
        free = model.generate(row, max_new_tokens=20, do_sample=False, use_cache=False)
    assert cached.tolist() == free.tolist()
