"""Modes of how the model is run: compiled, with adapters, spread over devices, in bfloat16, its outputs recorded."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from ..versions import CACHE
from .base import Answer, Expected, Mode, ModeError, Row
from .continuing import static_cache
from .helpers import generate, joined, seeded
from .states import state_error
from .truth import Prompts, Truth

# A state in float32 with bfloat16 inputs is off by 0.002; a state in bfloat16 by 0.2 and more.
BFLOAT16_STATE_TOLERANCE = 0.01


def placing_modes(new: int, long: int) -> list[Mode]:
    """Modes that change how the model runs, writing `new` tokens; bfloat16 decoding takes `long` steps."""
    greedy = partial(_greedy, new=new)
    return [
        Mode("compiled-generate", "compiled generate(), static cache", partial(_compiled_generate, new=new), greedy),
        Mode("compiled-forward", "compiled forward, one graph", partial(_compiled_forward, new=new), greedy),
        Mode("recorded-outputs", "hidden states and attentions", _recorded, _recorded_truth),
        Mode("lora", "LoRA on every projection", partial(_generated, new=new), greedy, with_lora, _no_peft),
        Mode("device-map", "layers spread over devices", partial(_device_map, new=new), greedy),
        Mode(
            "bf16-decoding", f"bfloat16 state after {long} tokens", partial(state_error_after, steps=long),
            tolerance=BFLOAT16_STATE_TOLERANCE,
        ),
    ]  # fmt: skip


def _greedy(truth: Truth, new: int) -> Expected:
    return Expected([truth.greedy(truth.prompts[0], new)])


def _generated(model: Any, prompts: Prompts, new: int) -> Answer:
    return Answer(generate(model, prompts[:1], new)[0])


class _Graphs:
    """A torch.compile backend that runs graphs as traced and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> _Graphs:
        return self  # generate() copies its config, and with it the backend; the count stays one

    def must_be_one(self, steps: int) -> None:
        if self.count != 1:
            raise ModeError(f"{self.count} graphs were traced for {steps} steps; one serves all lengths")


def _compiled_generate(model: Any, prompts: Prompts, new: int) -> Answer:
    """generate() compiles its decode step by itself, given a cache that allows it."""
    graphs = _Graphs()
    config = CompileConfig(fullgraph=True, mode="default", backend=graphs)
    config._compile_all_devices = True  # type: ignore[assignment]  # else only on accelerators
    torch._dynamo.reset()  # earlier graphs of the same code would count against its recompile limit
    model = copy.deepcopy(model)  # generate() keeps the compiled call on the model
    rows, _ = generate(model, prompts[:1], new, cache_implementation="static", compile_config=config)
    graphs.must_be_one(new - 1)
    return Answer(rows)


@torch.no_grad()
def _compiled_forward(model: Any, prompts: Prompts, new: int) -> Answer:
    """Decode steps by a compiled forward on a static cache, nothing passed but the token and the cache."""
    graphs = _Graphs()
    torch._dynamo.reset()
    step = torch.compile(model.__call__, backend=graphs, fullgraph=True)
    tokens, cache = list(prompts[0]), static_cache(model, prompts, new)
    output = model(input_ids=torch.tensor([tokens], device=model.device), **{CACHE: cache}, use_cache=True)
    logits = [output.logits[0].float().cpu()]
    for _ in range(new):
        tokens.append(int(logits[-1][-1].argmax()))
        token = torch.tensor([tokens[-1:]], device=model.device)
        logits.append(step(input_ids=token, **{CACHE: cache}, use_cache=True).logits[0].float().cpu())
    graphs.must_be_one(new)
    return Answer([Row(tokens, 0, torch.cat(logits))])


RECORDED: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}


def _eager(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # the only one that returns softmax attention weights
    return model


def _named(output: Any) -> dict[str, torch.Tensor]:
    return {
        f"{kind[:-1].replace('_', ' ')} {i}": value.float().cpu()
        for kind in ("hidden_states", "attentions")
        for i, value in enumerate(output[kind])
    }


@torch.no_grad()
def _recorded(model: Any, prompts: Prompts) -> Answer:
    ids = torch.tensor(prompts[:1], device=model.device)
    output = _eager(model)(input_ids=ids, **RECORDED)
    return Answer([Row(prompts[0], 0, output.logits[0].float().cpu())], _named(output))


def _recorded_truth(truth: Truth) -> Expected:
    return Expected(values=_named(truth.changed(_eager).forward(truth.prompts[0], **RECORDED)))


def with_lora(model: Any) -> Any:
    """The model with LoRA adapters of fixed, non-zero weights on every linear projection but the output embedding."""
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name, module in linear if module is not head]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    with seeded(3, torch.device("cpu")):
        return get_peft_model(model, config).eval()


def _no_peft() -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def _device_map(model: Any, prompts: Prompts, new: int) -> Answer:
    """The second half of the layers on another device: from a GPU on the CPU, from the CPU on the disk."""
    from accelerate import dispatch_model

    model = copy.deepcopy(model)
    main, other = ("cpu", "disk") if model.device.type == "cpu" else (model.device, "cpu")
    base, prefix = model.base_model, model.base_model_prefix
    device_map = {name: main for name, child in model.named_children() if child is not base}
    device_map |= {f"{prefix}.{name}": main for name, _ in base.named_children() if name != "layers"}
    for i in range(len(base.layers)):
        device_map[f"{prefix}.layers.{i}"] = main if i < len(base.layers) // 2 else other
    with tempfile.TemporaryDirectory() as folder:
        model = dispatch_model(model, device_map, main_device=main, offload_dir=folder)
        return _generated(model, prompts, new)


@torch.no_grad()
def state_error_after(model: Any, prompts: Prompts, steps: int) -> Answer:
    """Decode `steps` given tokens one by one in bfloat16; the error of the states against float64."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    tokens = joined(prompts)
    tokens = (tokens * (steps // len(tokens) + 1))[:steps]
    return Answer(measured=state_error(model, tokens))
