"""Training leet_hf's RetNet: gradients with pads, packing, checkpointing and adapters; dropout; initial weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

import tiny
import tiny_retnet
from leet_hf.modes.helpers import Side, padded
from leet_hf.modes.placing import with_lora
from leet_hf.modes.truth import relative_error
from leet_hf.retnet import RetNetModel

TRAINED = ["fla", "port", "deepnorm", "grouped", "hybrid"]
ROWS = tiny.prompts((19, 30, 9))
IDS = torch.tensor([ROWS[0], ROWS[1][:19]])
TOLERANCE = 1e-4


@functools.cache
def model_of(kind: str) -> Any:
    return tiny_retnet.model(kind)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def gradients(model: Any, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    value = loss(model)
    value.backward()
    return {"loss": value.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert relative_error(got[name], value) <= TOLERANCE, name


def summed_loss(logits: Tensor) -> Tensor:
    """logits: of every row, one after the other."""
    pieces = zip(logits.split([*map(len, ROWS)]), ROWS, strict=True)
    return sum(
        (cross_entropy(own[:-1], torch.tensor(row[1:]), reduction="sum") for own, row in pieces), torch.zeros(())
    )


def separate(model: Any) -> Tensor:
    """The truth: each row alone, without padding."""
    return summed_loss(torch.cat([model(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]))


def in_batch(model: Any, side: Side = "middle") -> Tensor:
    ids, mask = padded(ROWS, side, torch.device("cpu"))
    return summed_loss(model(ids, attention_mask=mask).logits[mask.bool()])


def packed(model: Any) -> Tensor:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate([{"input_ids": row} for row in ROWS])
    del batch["labels"]
    return summed_loss(model(**batch, use_cache=False).logits[0])


@functools.cache
def true_gradients(kind: str) -> dict[str, Tensor]:
    return gradients(copy.deepcopy(model_of(kind)).train(), separate)


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_of_padded_and_packed_rows(kind: str) -> None:
    model = copy.deepcopy(model_of(kind)).train()
    for loss in (in_batch, lambda model: in_batch(model, "left"), packed):
        assert_same(gradients(model, loss), true_gradients(kind))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["port", "hybrid"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    model = copy.deepcopy(model_of(kind)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    for loss in (in_batch, packed):
        runs.clear()
        assert_same(gradients(model, loss), true_gradients(kind))
        assert len(runs) == 2, "a layer runs again for its gradients"


def test_lora_on_every_projection_is_trained() -> None:
    pytest.importorskip("peft")
    model = with_lora(copy.deepcopy(model_of("port"))).train()
    in_batch(model).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    projections = {name.split(".")[-4] for name in trained}  # before `.lora_A.default.weight`
    assert projections == {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "up_proj", "down_proj"}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (name in trained), name


def test_dropout_and_drop_path_act_in_training_alone() -> None:
    rates = {"dropout": 0.1, "activation_dropout": 0.1, "drop_path_rate": 0.5}
    for name, rate in rates.items():
        model = tiny_retnet.model("torchscale", **{name: rate})
        assert torch.equal(logits_of(model), logits_of(model_of("torchscale"))), name
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mean = torch.stack([logits_of(model) for _ in range(4)])
        assert mean.std(0).max() > 0, name


def test_initial_weights() -> None:
    """As transformers; values and MLP scaled as torchscale does with DeepNorm and Sub-LN."""
    for kind, factor in (("fla", 1.0), ("deepnorm", (8.0 * 2) ** -0.25), ("port", 1.386294**0.5)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = RetNetModel(tiny_retnet.config(kind, initializer_range=0.02, hidden_size=256))
        block = model.layers[1]
        scaled = {"attn.v_proj", "attn.o_proj", "mlp.down_proj"}
        scaled.add("mlp.up_proj" if block.mlp.gate_proj is None else "mlp.gate_proj")
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                expected = 0.02 * (factor if name in scaled else 1.0)
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05), (kind, name)
        assert all(torch.equal(p, torch.zeros_like(p)) for n, p in model.named_parameters() if n.endswith("bias"))


def test_training_lowers_the_loss() -> None:
    model = copy.deepcopy(model_of("fla")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        losses.append(float(gradients(model, in_batch)["loss"]))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
