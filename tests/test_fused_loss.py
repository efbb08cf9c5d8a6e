"""The loss in pieces of rows: transformers' own, values and gradients, without float32 copies of the logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

import tiny
import tiny_retnet
from leet_hf import patch_model, patch_report, unpatch_model
from leet_hf.fused import loss as module
from leet_hf.fused.loss import causal_lm_loss
from patching import skip_unless_stock_pickles

V = 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REPORTED = "loss: in pieces, no float32 copy of the logits"


@pytest.fixture(params=[1, 4 * V, 1 << 25], ids=["a row", "four rows", "all rows"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", request.param)


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(3, 7, V, generator=generator)).to(dtype)
    labels = torch.randint(V, (3, 7), generator=generator)
    labels[0, :3] = labels[2, -1] = -100
    return logits, labels


def with_gradient(
    function: Callable[..., Tensor], logits: Tensor, labels: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    result = function(leaf, labels, V, **options)
    (3 * result).backward()
    assert leaf.grad is not None
    return result.detach(), leaf.grad


def agree(logits: Tensor, labels: Any, **options: Any) -> None:
    got, want = (with_gradient(f, logits, labels, **options) for f in (causal_lm_loss, ForCausalLMLoss))
    assert got[0].dtype == want[0].dtype and got[1].dtype == want[1].dtype == logits.dtype
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    rounding = max(torch.finfo(logits.dtype).eps, 1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=rounding, atol=1e-7, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(causal_lm_loss(logits, labels, V, **options), got[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(dtype: torch.dtype, pieces: None) -> None:
    agree(*made(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [11, torch.tensor(11)], ids=["int", "tensor"])
def test_options(dtype: torch.dtype, items: Any, pieces: None) -> None:
    logits, labels = made(dtype)
    agree(logits, labels, num_items_in_batch=items, further="not read")
    agree(logits, None, shift_labels=labels, num_items_in_batch=items)
    agree(logits, labels.clamp(min=0), ignore_index=5)
    agree(logits, labels.masked_fill(labels < 0, V + 3), ignore_index=V + 3)


def test_nothing_to_predict(pieces: None) -> None:
    logits, labels = made()
    agree(logits, torch.full_like(labels, -100))
    agree(logits, torch.full_like(labels, -100), num_items_in_batch=4)
    agree(logits[:, :0], labels[:, :0])


def test_strided_logits() -> None:
    logits, labels = made(torch.bfloat16)
    padded = torch.cat([logits, logits], dim=1)[:, :7]
    got = with_gradient(causal_lm_loss, padded, labels)
    want = with_gradient(causal_lm_loss, logits, labels)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("wrong", ["label", "dtype", "vocabulary", "tokens", "nothing"])
def test_refusals_are_those_of_transformers(wrong: str) -> None:
    logits, labels = made()
    given: dict[str, tuple[Any, ...]] = {
        "label": (logits, labels.masked_fill(labels < 0, V), V),
        "dtype": (logits, labels.int(), V),
        "vocabulary": (logits, labels, V - 1),
        "tokens": (logits, labels[:, 1:], V),
        "nothing": (logits, None, V),
    }
    raised = []
    for function in (ForCausalLMLoss, causal_lm_loss):
        with pytest.raises((RuntimeError, ValueError, IndexError, TypeError, AttributeError)) as error:
            function(*given[wrong])
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_second_derivatives(pieces: None) -> None:
    logits, labels = made()
    found = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        leaf = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, labels, V), leaf, create_graph=True)
        first.square().sum().backward()
        found.append((first.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_functorch_and_compile() -> None:
    logits, labels = made()
    got = torch.func.grad(lambda x: causal_lm_loss(x, labels, V))(logits)
    torch.testing.assert_close(got, with_gradient(ForCausalLMLoss, logits, labels)[1] / 3)
    compiled = torch.compile(causal_lm_loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(with_gradient(f, logits, labels) for f in (compiled, ForCausalLMLoss)), strict=True):
        torch.testing.assert_close(a, b)


def kept(function: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd keeps, parameters and all."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(storages.values())


def test_what_is_kept_is_the_logits() -> None:
    logits, labels = made(torch.bfloat16)
    logits.requires_grad_()
    size, extra = logits.numel(), 16 * labels.numel()
    assert 2 * size <= kept(lambda: causal_lm_loss(logits, labels, V)) <= 2 * size + extra
    assert kept(lambda: ForCausalLMLoss(logits, labels, V)) >= 4 * size


def test_largest_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tensor of more than a piece, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    self.seen = max(self.seen, tensor.numel())
            return out

    monkeypatch.setattr(module, "PIECE", 4 * V)
    seen = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        logits, labels = made(torch.bfloat16)
        with Largest() as largest:
            function(logits.requires_grad_(), labels, V).backward()
        seen.append(largest.seen)
    assert seen == [4 * V, logits.numel()]


def test_patch_installs_and_unpatch_restores() -> None:
    model = patch_model(tiny.model())
    assert model.loss_function is causal_lm_loss and REPORTED in patch_report(model).host
    assert copy.deepcopy(model).loss_function is causal_lm_loss
    unpatch_model(model)
    assert model.loss_function is ForCausalLMLoss and "_loss_function" not in model.__dict__


def test_pickle() -> None:
    skip_unless_stock_pickles()
    assert pickle.loads(pickle.dumps(patch_model(tiny.model()))).loss_function is causal_lm_loss


def own_loss(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())


def test_a_loss_of_somebody_elses_is_left_alone() -> None:
    model = tiny.model()
    model.loss_function = own_loss
    patch_model(model)
    assert model.loss_function is own_loss and REPORTED not in patch_report(model).host
    assert unpatch_model(model).loss_function is own_loss
    model = patch_model(tiny.model())
    model.loss_function = own_loss
    assert unpatch_model(model).loss_function is own_loss
    model = tiny.model()
    model.loss_type = "ForMaskedLM"
    wanted = model.loss_function
    assert patch_model(model).loss_function is wanted


@pytest.mark.parametrize("kind", ["minimax", "fla"])
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointing", "reentrant"])
def test_training_steps(kind: str, how: str) -> None:
    """A model's step with our loss is its step with transformers'."""
    ids = torch.tensor(tiny.prompts((9, 9)))
    found = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        model = patch_model(tiny.model()) if kind == "minimax" else tiny_retnet.model(kind)
        assert model.loss_function is causal_lm_loss
        model.loss_function = function
        model.train()
        if how in ("checkpointing", "reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            result = model(ids, labels=ids, use_cache=False).loss
        result.backward()
        found.append([result.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    tolerance = 2e-2 if how == "autocast" else 1e-5
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6
