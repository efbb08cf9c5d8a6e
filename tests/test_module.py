"""DecayLinearAttention against the float64 operator, alone and inside a model of one's own."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

import host_checks
import tiny
from leet_hf import DecayLinearAttention, upgrade_cache
from leet_hf import decay as formulas
from leet_hf.cache import RecurrentLayer
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_argument, create_causal_mask, create_recurrent_attention_mask
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


# Inside a model of one's own: every decoding mode of generate(), without patch_model.


class OwnBlock(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        sizes = {"layer_idx": index, "num_key_value_heads": 2, "num_layers": 3}
        decay = {0: "minimax_text_01", 2: "learned"}.get(index)
        self.linear = decay is not None
        self.attention = (
            DecayLinearAttention(32, 4, decay=decay, **sizes) if self.linear else LlamaAttention(config, index)  # type: ignore[arg-type]
        )
        self.mlp, self.first, self.second = LlamaMLP(config), LlamaRMSNorm(32), LlamaRMSNorm(32)

    def forward(self, x: torch.Tensor, masks: tuple[Any, Any], **options: Any) -> torch.Tensor:
        x = x + self.attention(self.first(x), attention_mask=masks[not self.linear], **options)[0]
        return x + self.mlp(self.second(x))


class OwnModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa, _no_split_modules = LlamaConfig, "model", True, ("OwnBlock",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.layers = nn.ModuleList([OwnBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm, self.rope = LlamaRMSNorm(32), LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any, embeds: Any, **kwargs: Any
    ) -> Any:
        x = self.embed(input_ids) if embeds is None else embeds
        if position_ids is None:
            start = past.get_seq_length() if past is not None else 0
            position_ids = (torch.arange(x.shape[1]) + start)[None]
        arguments = {"config": self.config, "inputs_embeds": x, "position_ids": position_ids, CACHE: past}
        masks: Any = attention_mask
        if not isinstance(attention_mask, dict):
            make = (create_recurrent_attention_mask, create_causal_mask)
            masks = tuple(f(attention_mask=attention_mask, **arguments) for f in make)
        turns = self.rope(x, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, masks, position_embeddings=turns, **{CACHE: past}, **kwargs)
        return self.norm(x)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix, _supports_sdpa = LlamaConfig, "model", True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model, self.lm_head = OwnModel(config), nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def create_masks_for_generate(self, config: Any, inputs_embeds: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return attention_mask  # the base model makes one for each kind of layer

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, use_cache: Any = None, cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        past = cache_argument(past_key_values, cache)
        past = DynamicCache() if past is None and use_cache else past
        x = self.model(input_ids, attention_mask, position_ids, past, inputs_embeds, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(x), **{CACHE: past})


@functools.cache
def own() -> Any:
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return host_checks.make(OwnForCausalLM, config)


@functools.cache
def truth() -> Truth:
    return Truth(own(), tiny.prompts())


MODES = (
    "greedy", "beam", "left-padding", "chunked-prefill", "middle-padding", "chat", "multi-token", "static-cache",
    "dynamic-cache-given", "static-cache-given", "reset", "batch-select", "reorder", "assisted-recurrent-draft",
    "assisted-softmax-draft", "prompt-lookup", "lora", "chat-padded-batch-in-chunks", "static-left-padding",
)  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_modes_of_a_model_with_it(name: str) -> None:
    host_checks.must_agree(name, own(), truth())


def test_patching_it_is_not_needed() -> None:
    host_checks.is_refused(own(), "DecayLinearAttention layers, which need no patching")


def test_compiled_steps_of_a_model_with_it() -> None:
    """After `upgrade_cache`, one graph serves all lengths."""
    model, tokens = own(), tiny.prompts()[0]
    cache = upgrade_cache(StaticCache(config=model.config, max_cache_len=40), model)
    assert [isinstance(layer, RecurrentLayer) for layer in cache.layers] == [True, False, True]
    torch._dynamo.reset()
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens[:-3]]), **{CACHE: cache})
        step = torch.compile(model.__call__, backend="eager", fullgraph=True)
        logits = [step(input_ids=torch.tensor([[token]]), **{CACHE: cache}).logits for token in tokens[-3:]]
    assert relative_error(torch.cat(logits, 1)[0], truth().logits(tokens)[-3:]) <= 1e-4
