"""Patching beside others who wrap a model: accelerate's hooks, offloading, PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import (
    MiniMaxModel,
)

import tiny
from leet_hf import (
    patch_model,
    patch_report,
    unpatch_model,
)
from leet_hf.fused.expert_binding import ExpertsBinding
from leet_hf.fused.norms import NormBinding, norm_forward
from leet_hf.host import decoder_forward
from leet_hf.layer import layer_forward
from patching import IDS, lightning, outputs, same


def hook(model: nn.Module) -> None:
    """Hooks of accelerate that do nothing, where device_map puts them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | MiniMaxModel) or module in lightning(model):
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True))


@pytest.mark.parametrize("order", ["hook patch unpatch", "patch hook unpatch", "patch hook unhook unpatch"])
def test_hooks_of_accelerate(order: str) -> None:
    model, stock = tiny.model(), tiny.model()
    want = outputs(stock)
    hook(stock)
    if order == "patch hook unhook unpatch":
        remove_hook_from_module(stock, recurse=True)
    first, second, *rest = order.split()
    actions = {"hook": hook, "patch": patch_model, "unhook": lambda model: remove_hook_from_module(model, recurse=True)}
    for action in (first, second):
        actions[action](model)
    same(outputs(model), want)
    same(model(IDS[:, :5], use_cache=True).logits, want[:, :5])  # with a cache, which stock hooks would not allow
    assert model.model._hf_hook is not None
    if rest[0] == "unhook":
        actions["unhook"](model)
        same(model(IDS, use_cache=True).logits, want)
    unpatch_model(model)
    assert torch.equal(outputs(model), want)
    for ours, theirs in zip(model.modules(), stock.modules(), strict=True):
        extra = set(ours.__dict__) - set(theirs.__dict__)
        assert extra <= ({"forward"} if rest[0] == "unhook" else set()) and "_leet" not in ours.__dict__
        for slot in ("forward", "_old_forward"):
            forward = ours.__dict__.get(slot)
            while forward is not None:
                assert getattr(forward, "func", None) not in (layer_forward, decoder_forward, norm_forward)
                forward = getattr(forward, "__wrapped__", None)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_slopes_of_an_offloaded_layer(offload_buffers: bool) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny.model(), execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    where = model.model.layers[0].self_attn.slope_rate.device.type
    assert where == ("meta" if offload_buffers else "cpu")
    patch_model(model)
    same(outputs(model), outputs(tiny.model()))
    assert patch_report(model).layers[0].decay.startswith("formula")


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    targets = ["qkv_proj", "out_proj", "output_gate", "q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)

    def wrapped(model: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(model, config).eval()

    stock = wrapped(tiny.model())
    for model in (patch_model(wrapped(tiny.model())), wrapped(patch_model(tiny.model()))):
        same(outputs(model), outputs(stock))
        for module in lightning(model):
            assert isinstance(module.qkv_proj, peft.tuners.lora.Linear)
        assert patch_report(model).layers[0].name.endswith("model.layers.0.self_attn")
        ids = model.generate(input_ids=IDS, max_new_tokens=20, do_sample=False)
        assert torch.equal(ids, stock.generate(input_ids=IDS, max_new_tokens=20, do_sample=False, use_cache=False))
        bindings = [module.__dict__["_leet"] for module in model.modules() if "_leet" in module.__dict__]
        norms = sum(isinstance(binding, NormBinding) for binding in bindings)
        assert norms == 4 * 2 + 3 + 1, "two each layer, one in each of the recurrent ones, and the last"
        experts = sum(isinstance(binding, ExpertsBinding) for binding in bindings)
        assert experts == 4, "one each layer"
        assert len(bindings) - norms - experts == 5, "three layers, the base model and the model that generates"
        merged = unpatch_model(model.merge_and_unload())
        assert all("_leet" not in module.__dict__ for module in merged.modules())
