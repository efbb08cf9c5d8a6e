"""DecayLinearAttention against the float64 operator: decays, caches, padding, packing, dtypes, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from leet_hf import DecayLinearAttention, upgrade_cache
from leet_hf import decay as formulas
from leet_hf.cache import RecurrentLayer
from leet_hf.modes.truth import relative_error
from leet_linear_attention import reference

HIDDEN, HEADS = 24, 4
KINDS: dict[str, dict[str, Any]] = {
    "retnet": {},
    "grouped, wide values": {"num_key_value_heads": 2, "value_dim": 10, "gate": "sigmoid", "bias": True},
    "minimax": {"decay": "minimax", "num_layers": 3, "layer_idx": 1, "scale": 1.0},
    "given": {"decay": [-0.5, -0.1, 0.0, -2.0], "gate": None, "norm": False, "head_dim": 5},
    "learned": {"decay": "learned", "num_key_value_heads": 1},
    "none": {"decay": None},
}


def made(kind: str = "retnet", dtype: torch.dtype = torch.float32, **changes: Any) -> DecayLinearAttention:
    torch.manual_seed(0)
    module = DecayLinearAttention(HIDDEN, HEADS, **KINDS[kind] | changes).to(dtype)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return module


def inputs(batch: int = 2, tokens: int = 19, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def truth_of(module: DecayLinearAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer written out in float64, with the quadratic form of the operator."""
    wide = copy.deepcopy(module).double()
    x = x.double()
    heads, few = wide.num_heads, wide.num_key_value_heads
    q, k, v = (
        proj(x).unflatten(-1, (count, -1))
        for proj, count in ((wide.q_proj, heads), (wide.k_proj, few), (wide.v_proj, few))
    )
    if wide.decay_proj is not None:
        log_decay = torch.nn.functional.logsigmoid(wide.decay_proj(x)) / 16
    else:
        log_decay = None if wide.log_decays is None else torch.tensor(wide.log_decays, dtype=torch.float64)
    o, _ = reference.quadratic(q, k, v, log_decay, scale=wide.scale)
    if wide.norm is not None:
        o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * wide.norm.weight
    o = o.flatten(-2)
    if wide.gate == "swish":
        o = o * nn.functional.silu(wide.gate_proj(x))  # type: ignore[misc]
    elif wide.gate == "sigmoid":
        o = o * torch.sigmoid(wide.gate_proj(x))  # type: ignore[misc]
    return wide.out_proj(o)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_float64_operator_with_gradients(kind: str) -> None:
    module, x = made(kind), inputs().requires_grad_()
    want = truth_of(module, x)
    got, state = module(x)
    assert state is None and relative_error(got, want) <= 1e-5
    direction = torch.randn_like(got)
    expected = torch.autograd.grad(want, x, direction.double())[0]
    got.backward(direction)
    assert x.grad is not None and relative_error(x.grad, expected) <= 1e-5
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert relative_error(copy.deepcopy(module).double()(x.detach().double())[0], want) <= 1e-12


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_whole(kind: str, static: bool) -> None:
    module, x = made(kind).eval(), inputs(tokens=30)
    want = module(x, output_attentions=True)
    cache: Any = DynamicCache()
    if static:
        cache = StaticCache(config=LlamaConfig(num_hidden_layers=3), max_cache_len=30)
    with torch.no_grad():
        got = [module(part, past_key_values=cache)[0] for part in x.split([7, 1, 1, 3, 17, 1], dim=1)]
    assert relative_error(torch.cat(got, 1), want[0]) <= 1e-5
    layer = cache.layers[module.layer_idx]
    assert isinstance(layer, RecurrentLayer) and int(layer.get_seq_length()) == 30
    assert relative_error(layer.recurrent_states[0], want[1]) <= 1e-5


def test_gradients_through_a_cache() -> None:
    module, x = made("learned"), inputs()
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    cache = DynamicCache()
    parts = [module(part, cache=cache)[0] for part in x.split([9, 10], dim=1)]
    got = torch.autograd.grad(torch.cat(parts, 1).square().sum(), list(module.parameters()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("kind", ["retnet", "learned", "none"])
@pytest.mark.parametrize("mask", ["0011111", "1111100", "1101011"])
def test_pads_change_nothing(kind: str, mask: str) -> None:
    module, x = made(kind).eval(), inputs(1, 7)
    real = torch.tensor([[int(c) for c in mask]])
    shown = real[0].bool()
    want = module(x[:, shown])[0]
    assert relative_error(module(x, attention_mask=real)[0][:, shown], want) <= 1e-5
    cache = DynamicCache()  # with a mask of the whole, as generate() gives it
    with torch.no_grad():
        got = [
            module(x[:, a:b], attention_mask=real[:, :b], past_key_values=cache)[0] for a, b in ((0, 4), (4, 6), (6, 7))
        ]
    assert relative_error(torch.cat(got, 1)[:, shown], want) <= 1e-5


def test_packed_sequences_do_not_see_each_other() -> None:
    module, x = made(decay=[-1e-6] * HEADS).eval(), inputs(1, 12)
    lengths = [5, 1, 6]
    want = torch.cat([module(part)[0] for part in x.split(lengths, dim=1)], 1)
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    assert relative_error(module(x, cu_seq_lens_q=bounds)[0], want) <= 1e-5
    assert relative_error(module(x, seq_idx=index)[0], want) <= 1e-5
    assert relative_error(module(x)[0], want) > 1e-2
    cache = DynamicCache()
    module(x, past_key_values=cache)
    with pytest.raises(ValueError, match="packed sequences were given"):
        module(x, seq_idx=index, past_key_values=cache)


def test_rotary_positions() -> None:
    """Turned q and k know only how far they are apart: the same for positions moved by any amount."""
    module, x = made().eval(), inputs()
    rope = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS))
    here, there = (module(x, position_embeddings=rope(x, torch.arange(19)[None] + start))[0] for start in (0, 100))
    assert relative_error(here, there) <= 1e-4 and relative_error(here, module(x)[0]) > 1e-2


@pytest.mark.parametrize("kind", ["grouped, wide values", "learned", "given"])
def test_state_dict_and_pickle(kind: str) -> None:
    module, x = made(kind).eval(), inputs()
    want = module(x)[0]
    other = DecayLinearAttention(HIDDEN, HEADS, **KINDS[kind]).eval()
    assert relative_error(other(x)[0], want) > 1e-2
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x)[0], want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x)[0], want)
    assert torch.equal(copy.deepcopy(module)(x)[0], want)
    with torch.device("meta"):
        empty = DecayLinearAttention(HIDDEN, HEADS, **KINDS[kind])
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(module.state_dict())
    assert torch.equal(filled(x)[0], want)


def test_bfloat16_keeps_decays_and_state_in_float32() -> None:
    module = made("minimax", torch.bfloat16, layer_idx=2).eval()  # the last layer, whose decays bfloat16 can not hold
    x = inputs(1, 200, torch.bfloat16)
    want = truth_of(module, x)
    cache = DynamicCache()
    with torch.no_grad():
        whole = module(x)[0]
        steps = torch.cat([module(x[:, i : i + 1], past_key_values=cache)[0] for i in range(200)], 1)
    assert whole.dtype == steps.dtype == torch.bfloat16
    assert relative_error(whole, want) <= 0.01 and relative_error(steps, want) <= 0.01
    assert cache.layers[2].recurrent_states[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = made("minimax", layer_idx=2)(inputs())
    assert relative_error(mixed, made("minimax", layer_idx=2)(inputs())[0]) <= 0.02


def test_compiles_whole_with_gradients() -> None:
    module, x = made("learned"), inputs()
    step = torch.compile(module, backend="eager", fullgraph=True)
    got = torch.autograd.grad(step(x)[0].square().sum(), list(module.parameters()))
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_a_formula_gives_what_it_says() -> None:
    assert made().log_decays == formulas.retnet(HEADS)
    assert made("minimax").log_decays == formulas.minimax(HEADS, 1, 3)
    assert "heads=4/2" in repr(made("grouped, wide values")) and "'retnet'" in repr(made())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "gla"}, "decay is 'gla', must be one of 'alibi'"),
        ({"decay": "minimax"}, "depends on the depth: give num_layers"),
        ({"decay": [-0.1, -0.2]}, "2 entries for 4 heads"),
        ({"decay": [-0.1, 0.5, -1, -1]}, "must be finite logarithms <= 0"),
        ({"decay": [-0.1, float("nan"), -1, -1]}, "must be finite logarithms <= 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, must divide"),
        ({"num_heads": 5}, "no multiple of num_heads, 5: give head_dim"),
        ({"gate": "tanh"}, "gate is 'tanh', must be one of 'swish', 'sigmoid'"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecayLinearAttention(**{"hidden_size": HIDDEN, "num_heads": HEADS} | changes)


def test_inputs_that_do_not_fit() -> None:
    module, x = made().eval(), inputs()
    with pytest.raises(ValueError, match=r"hidden_states has shape \[2, 24\]"):
        module(x[:, 0])
    with pytest.raises(ValueError, match="give the mask of pads itself"):
        module(x, attention_mask=torch.ones(2, 1, 19, 19))
    with pytest.raises(ValueError, match="8 channels, must have 6"):
        module(x, position_embeddings=(torch.ones(1, 19, 8),) * 2)
    cache = DynamicCache()
    module(x, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows but the input has 1"):
        module(x[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="holds RecurrentShape"):
        made("grouped, wide values").eval()(x, past_key_values=cache)
    softmax = DynamicCache()
    softmax.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    for place in (0, 1):
        with pytest.raises(ValueError, match="of another model"):
            made(layer_idx=place).eval()(x[:, :1], past_key_values=softmax)
    assert softmax.get_seq_length() == 5
    with pytest.raises(ValueError, match="is a dict, must be a DynamicCache"):
        module(x, past_key_values={"layers": 1})
    with pytest.raises(ValueError, match="two layers have layer_idx 0"):
        upgrade_cache(DynamicCache(), nn.Sequential(made(), made()))
    assert int(cache.get_seq_length()) == 19
