"""What tests of adapters share: the decoding modes over a host, parity in logits and gradients, patching and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import tiny
from combined_modes import COMBINED
from leet_hf import UnsupportedModelError, load_cache, patch_model, patch_report, save_cache, unpatch_model
from leet_hf.modes import Mode, Truth, check, modes
from leet_hf.modes.placing import with_lora
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_of
from patching import snapshot
from test_training_modes import assert_same, gradients, in_batch, packed, separate

NEW = 18  # tokens written in each mode: more than a decode buffer (16) holds
# State precision has a check of its own here: the mode knows MiniMax's projections alone. Of the combined modes, those
# that a host can get wrong: its masks, positions and packing. The others are about caches.
COMBINATIONS = (
    "static-left-padding", "static-middle-padding", "one-token-prompt", "chat-padded-batch-in-chunks",
    "packed-by-seq-idx",
)  # fmt: skip
MODES = {mode.name: mode for mode in modes(new=NEW) if mode.name != "bf16-decoding"}
MODES |= {mode.name: mode for mode in COMBINED if mode.name in COMBINATIONS}
# generate() compiles by itself where a class says it can be compiled, which remote code does not.
UNCOMPILED = "compiled-generate"


def make(kind: Callable[[Any], nn.Module], config: Any, seed: int = 0) -> Any:
    """A random model in eval mode; the same weights for the same seed. Norm weights differ from 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                assert parameter.isfinite().all(), name
    return model


def must_agree(name: str, patched: Any, truth: Truth, mode: Mode | None = None) -> None:
    """A mode of a patched model against cache-free forwards of the stand-in."""
    mode = MODES[name] if mode is None else mode
    if (lacking := mode.missing()) is not None:
        pytest.skip(lacking)
    if name == UNCOMPILED and not getattr(patched, "_can_compile_fullgraph", False):
        pytest.skip("the host's class does not say that it can be compiled")
    outcome = check(mode, patched, truth=truth)
    assert outcome.agrees, outcome.reason


@contextmanager
def wider() -> Iterator[None]:
    """Within, what asks for float32 leaves float64 as it is: stand-ins, as the code they stand for, norm in float32."""
    narrow = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else narrow(self)  # type: ignore
    try:
        yield
    finally:
        torch.Tensor.float = narrow  # type: ignore


def same_logits_and_gradients(stock: Any, batch: int = 2, tokens: int = 21, **options: Any) -> None:
    """Logits, loss and the gradient of every parameter, of a copy that is patched and of the stock model.

    In float32 the logits, in float64 the gradients too: the stand-in's own, in float32, are off by up to 3e-4.
    """
    ids = torch.tensor([tiny.prompts((tokens,), seed=i)[0] for i in range(batch)])
    options |= {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.no_grad():
        want, got = stock(**options), patch_model(copy.deepcopy(stock))(**options)
    assert relative_error(got.logits, want.logits) <= 1e-5
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    with wider():
        stock = copy.deepcopy(stock).double()
        patched = patch_model(copy.deepcopy(stock))
        for model in (stock, patched):
            model.zero_grad()
            model(**options).loss.backward()
    grads = {name: parameter.grad for name, parameter in stock.named_parameters()}
    sizes = {name: grad.square().mean().sqrt() for name, grad in grads.items() if grad is not None}
    assert sizes
    for name, parameter in patched.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        # Some are nothing but rounding: those of a router that chooses one expert, say.
        if name in sizes and sizes[name] > 1e-7 * max(sizes.values()):
            error = relative_error(parameter.grad, grads[name])
            assert error <= 1e-5, f"the gradient of {name} is off by {error:.2g}"


def same_padded_and_packed_gradients(stock: Any) -> None:
    """In training mode, a batch with pads inside its rows and packed rows give the gradients of each row alone."""
    want = gradients(copy.deepcopy(stock).train(), separate)
    patched = patch_model(copy.deepcopy(stock)).train()
    assert_same(gradients(patched, lambda model: in_batch(model, "middle", use_cache=False)), want)
    assert_same(gradients(patched, packed), want)


def same_after_checkpointing(stock: Any, tokens: int = 21) -> None:
    """Gradient checkpointing gives the gradients of the stock model without it."""
    ids = torch.tensor(tiny.prompts((tokens,)))
    stock, patched = copy.deepcopy(stock).train(), patch_model(copy.deepcopy(stock)).train()
    patched.gradient_checkpointing_enable()
    calls: list[Any] = []
    inside = next(module for module in patched.base_model.layers[0].modules() if isinstance(module, nn.Linear))
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    stock(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    patched(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2, "it runs again for its gradients"
    grads = dict(stock.named_parameters())
    for name, parameter in patched.named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def same_hidden_states(stock: Any) -> None:
    """Hidden states, by argument and by config, and outputs as tuples; the attention of a layer is its state."""
    ids = torch.tensor(tiny.prompts((9,)))
    patched = patch_model(copy.deepcopy(stock))
    want = stock(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    asked = patched(input_ids=ids, output_hidden_states=True, output_attentions=True)
    patched.config.output_hidden_states = True
    for got in (asked.hidden_states, patched(input_ids=ids).hidden_states):
        assert len(got) == len(want)
        for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            assert relative_error(ours, theirs) <= 1e-5, i
    cache = cache_of(asked)
    for i, state in enumerate(asked.attentions):
        assert torch.equal(state, cache.layers[i].recurrent_states[0]), i
    patched.config.output_hidden_states = False
    first, *rest = patched(input_ids=ids, use_cache=False, return_dict=False)
    assert torch.equal(first, patched(input_ids=ids, use_cache=False).logits) and not rest


def patched_and_back(stock: Any, adapter: str, recurrent: Iterable[int], layers: int) -> None:
    """The report before, while and after; unpatching restores the modules, what generate() has, and the output."""
    model, recurrent = copy.deepcopy(stock), list(recurrent)
    before, state = snapshot(model), list(model.state_dict())
    ids = torch.tensor(tiny.prompts((9,)))
    want = model(input_ids=ids, use_cache=False).logits
    assert [layer.status for layer in patch_report(model).layers].count("not patched") == len(recurrent)
    assert patch_model(model) is model and patch_model(model) is model
    report = patch_report(model)
    assert [layer.index for layer in report.layers if layer.status == "patched"] == recurrent
    assert {layer.adapter for layer in report.layers if layer.status == "patched"} == {adapter}
    assert len(report.layers) == layers and report.patched == len(recurrent)
    assert all(layer.decay for layer in report.layers if layer.status == "patched")
    assert list(model.state_dict()) == state
    assert cache_of(model(input_ids=ids, use_cache=True)).get_seq_length() == 9
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)


@torch.no_grad()
def kept_and_loaded(stock: Any, folder: Path) -> None:
    """A patched model pickled; its cache in a file; its weights in a file, and what is made of them patched again."""
    model = patch_model(copy.deepcopy(stock))
    ids = torch.tensor(tiny.prompts((23, 23)))
    want = model(input_ids=ids, use_cache=False).logits
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(pickled(input_ids=ids, use_cache=False).logits, want)
    unpatch_model(pickled)
    assert relative_error(pickled(input_ids=ids, use_cache=False).logits, want) <= 1e-5
    cache = cache_of(model(input_ids=ids[:, :17], use_cache=True))
    again = load_cache(save_cache(cache, folder / "cache.safetensors", model), model)
    got = model(input_ids=ids[:, 17:], **{CACHE: again}, use_cache=True).logits
    assert relative_error(got, want[:, 17:]) <= 1e-5
    model.save_pretrained(folder)
    loaded = patch_model(type(stock).from_pretrained(folder).eval())
    assert relative_error(loaded(input_ids=ids, use_cache=False).logits, want) <= 1e-5


@torch.no_grad()
def patched_after_wrapping(stock: Any, folder: Path) -> None:
    """LoRA adapters, and weights on the disk by hooks of accelerate, that are there before the patch."""
    ids = torch.tensor(tiny.prompts((15, 15)))
    wrapped = with_lora(copy.deepcopy(stock))
    want = wrapped(input_ids=ids, use_cache=False).logits
    assert relative_error(patch_model(wrapped)(input_ids=ids).logits, want) <= 1e-5
    spread = copy.deepcopy(stock)
    places = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name, _ in spread.model.named_children()}
    del places["model.layers"]
    places |= {f"model.layers.{i}": "disk" for i in range(len(spread.model.layers))}
    spread = patch_model(dispatch_model(spread, places, main_device="cpu", offload_dir=folder))
    want = stock(input_ids=ids, use_cache=False).logits
    assert relative_error(spread(input_ids=ids).logits, want) <= 1e-5
    assert torch.equal(unpatch_model(spread)(input_ids=ids, use_cache=False).logits, want)


def is_refused(model: Any, message: str) -> None:
    """patch_model raises, with the part named, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        patch_model(model)
    assert snapshot(model) == before


@torch.no_grad()
def states_stay_float32(stock: Any, log_decays: dict[int, list[float]], tokens: int = 200) -> None:
    """States of bfloat16 decoding, token by token, against the float64 recurrence on the keys and values of that model.

    log_decays: by layer, what the float32 model has.
    """
    patched = patch_model(copy.deepcopy(stock).bfloat16())
    seen: dict[int, list[Any]] = {index: [] for index in log_decays}
    for module in patched.modules():
        binding = module.__dict__.get("_leet")
        if getattr(binding, "index", None) in seen:
            binding.adapter = _Recorder(binding.adapter, seen[binding.index])
    cache = None
    for token in tiny.prompts((tokens,))[0]:
        cache = cache_of(patched(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True))
    for index, pairs in seen.items():
        k, v = (torch.cat(x, dim=1)[0].double() for x in zip(*pairs, strict=True))  # [T, H, D]
        g = torch.tensor(log_decays[index], dtype=torch.float64)
        k, v = (x.repeat_interleave(len(g) // x.shape[1], dim=1) for x in (k, v))
        age = torch.arange(len(k) - 1, -1, -1, dtype=torch.float64)
        want = torch.einsum("th,thk,thv->hkv", torch.exp(g * age[:, None]), k, v)
        assert relative_error(cache.layers[index].recurrent_states[0][0], want) <= 0.01, index


class _Recorder:
    """An adapter that keeps the keys and values it projects."""

    def __init__(self, adapter: Any, kept: list[Any]) -> None:
        self._adapter, self._kept = adapter, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def project(self, *args: Any) -> Any:
        projected = self._adapter.project(*args)
        self._kept.append((projected.k, projected.v))
        return projected
