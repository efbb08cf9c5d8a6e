"""RetNet as flash-linear-attention (FLA) has it, in plain PyTorch: quadratic, one row at a time, no kernels.

Written from the definition in Sun et al., "Retentive Network" (arXiv 2307.08621), and from the modules, names,
signatures and cache of the package flash-linear-attention 0.6.0 (`fla.layers.MultiScaleRetention`, `fla.models.retnet`,
`fla.models.cache_utils`), which itself runs on a GPU alone. Its config, parameter and buffer names are the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache as HFCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class RetNetConfig(PreTrainedConfig):
    model_type = "retnet"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        hidden_ratio: int | None = 2,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 24,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        hidden_act: str = "swish",
        use_output_gate: bool = True,
        max_position_embeddings: int = 2048,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        attn: dict[str, Any] | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(
            pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings, **kwargs,
        )  # fmt: skip


class Cache(HFCache):
    """FLA's own cache: a state and a count of tokens per layer, with an `update` of another form than transformers'."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor] = []
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.states)

    def update(self, recurrent_state: Tensor, layer_idx: int, offset: int) -> None:  # type: ignore[override]
        if layer_idx == len(self.states):
            self.states.append(recurrent_state)
            self.seen.append(offset)
        else:
            self.states[layer_idx] = recurrent_state
            self.seen[layer_idx] += offset

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen[layer_idx] if layer_idx < len(self.seen) else 0


class RMSNorm(nn.Module):
    """With `prenorm`, the residual is added before and returned besides."""

    def __init__(self, hidden_size: int, elementwise_affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
        x = x if residual is None else x + residual
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        normed = normed if self.weight is None else normed * self.weight.float()
        return (normed.to(x.dtype), x) if prenorm else normed.to(x.dtype)


class FusedRMSNormGated(RMSNorm):
    """The norm of x times the swish of g."""

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * nn.functional.silu(g.float()).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rope by halves of the channels, angle of channel i at position t: t * base^(-2i / dim)."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base, self.scale_base, self.interleaved = dim, base, None, False
        self.register_buffer("inv_freq", torch.empty(dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.inv_freq.copy_(1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def forward(self, x: Tensor, offset: int) -> Tensor:
        """x [T, H, D] of one sequence that begins at position `offset`."""
        angle = torch.outer(torch.arange(offset, offset + len(x), dtype=torch.float32, device=x.device), self.inv_freq)
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class MultiScaleRetention(nn.Module):
    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.layer_idx = mode, hidden_size, layer_idx
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_groups = num_heads // self.num_kv_heads
        self.feature_map_fn = None if feature_map is None else ACT2FN[feature_map]
        self.use_short_conv, self.use_output_gate = False, use_output_gate
        self.key_dim, self.value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads

        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim // self.num_kv_groups, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim // self.num_kv_groups, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.fuse_norm_and_gate = gate_fn == "swish" and fuse_norm and use_output_gate
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = FusedRMSNormGated(self.head_v_dim, elementwise_affine, norm_eps)
        else:
            self.g_norm = RMSNorm(self.head_v_dim, elementwise_affine, norm_eps)
            self.gate_fn = ACT2FN[gate_fn]
        self.rotary = RotaryEmbedding(self.head_k_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Cache | None]:
        rows, tokens, _ = hidden_states.shape
        past = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            past = past_key_values.states[self.layer_idx]
        o = torch.zeros(rows, tokens, self.num_heads, self.head_v_dim, dtype=hidden_states.dtype)
        states = []
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        for row, places, offset in _sequences(rows, tokens, attention_mask, kwargs.get("cu_seqlens"), seen):
            x = hidden_states[row, places]
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q, k = q.unflatten(-1, (-1, self.head_k_dim)), k.unflatten(-1, (-1, self.head_k_dim))
            if self.feature_map_fn is not None:
                q, k = self.feature_map_fn(q), self.feature_map_fn(k)
            q, k = self.rotary(q, offset), self.rotary(k, offset)
            v = v.unflatten(-1, (-1, self.head_v_dim))
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=1) for t in (k, v))
            o[row, places], state = _retention(q, k, v, None if past is None else past[row])
            states.append(state)
        if past_key_values is not None:
            past_key_values.update(torch.stack(states), self.layer_idx, tokens)

        if self.fuse_norm_and_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(hidden_states).unflatten(-1, (-1, self.head_v_dim))).flatten(-2)
        else:
            o = self.g_norm(o).flatten(-2)
            o = o * self.gate_fn(self.g_proj(hidden_states)) if self.use_output_gate else o
        return self.o_proj(o), None, past_key_values


class Attention(nn.Module):
    """FLA's softmax attention, for the layers that config.attn names: rope of a base of its own, no cache here."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float = 10000.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.layer_idx, self.qk_norm, self.window_size = num_heads, layer_idx, qk_norm, window_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_groups, self.head_dim = num_heads // self.num_kv_heads, hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.rotary = RotaryEmbedding(self.head_dim, rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        assert past_key_values is None
        rows, tokens, _ = hidden_states.shape
        o = torch.zeros_like(hidden_states)
        for row, places, offset in _sequences(rows, tokens, attention_mask, kwargs.get("cu_seqlens"), 0):
            x = hidden_states[row, places]
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = self.rotary(q, offset), self.rotary(k, offset)
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=1) for t in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * self.head_dim**-0.5
            scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), float("-inf"))
            o[row, places] = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(-2)
        return self.o_proj(o), None, None


def _sequences(
    rows: int, tokens: int, mask: Tensor | None, bounds: Tensor | None, seen: int
) -> list[tuple[int, Tensor, int]]:
    """(row, places of its real tokens, how many real ones came before) for each sequence."""
    if bounds is not None:
        pieces = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return [(0, torch.arange(start, stop), 0) for start, stop in pieces]
    if mask is None:
        return [(row, torch.arange(tokens), seen) for row in range(rows)]
    return [(row, mask[row, -tokens:].nonzero().flatten(), int(mask[row, :-tokens].sum())) for row in range(rows)]


def _retention(q: Tensor, k: Tensor, v: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """o_t = K^-0.5 * (sum over s <= t of gamma^(t-s) (q_t . k_s) v_s + gamma^(t+1) q_t S), and the next S.

    q, k [T, H, K], v [T, H, V], S [H, K, V]; gamma_h = 1 - 2^(-5-h).
    """
    length, heads = q.shape[:2]
    scale = q.shape[-1] ** -0.5
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    place = torch.arange(length, dtype=torch.float64)
    age = place[:, None] - place
    decay = torch.where(age >= 0, gamma[:, None, None] ** age.clamp(min=0), 0).to(q.dtype)
    o = torch.einsum("thk,shk,hts,shv->thv", q, k, decay, v) * scale
    state = torch.einsum("shk,hs,shv->hkv", k, decay[:, -1], v)
    if past is not None:
        since = (gamma[:, None] ** (place + 1)).to(q.dtype)
        o = o + torch.einsum("thk,ht,hkv->thv", q, since, past) * scale
        state = state + since[:, -1, None, None] * past
    return o, state


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, hidden_ratio: int | None, intermediate_size: int | None) -> None:
        super().__init__()
        if intermediate_size is None:
            intermediate_size = int(hidden_size * (4 if hidden_ratio is None else hidden_ratio) * 2 / 3)
            intermediate_size = 256 * ((intermediate_size + 255) // 256)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class RetNetBlock(GradientCheckpointingLayer):
    def __init__(self, config: RetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        norm = RMSNorm if config.fuse_norm else nn.RMSNorm
        self.attn_norm = norm(config.hidden_size, eps=config.norm_eps)
        softmax = dict(config.attn or {})
        if layer_idx in softmax.pop("layers", ()):
            self.attn: nn.Module = Attention(config.hidden_size, layer_idx=layer_idx, **softmax)
        else:
            self.attn = MultiScaleRetention(
                config.attn_mode, config.hidden_size, config.expand_k, config.expand_v, config.num_heads,
                config.num_kv_heads, config.feature_map, config.use_output_gate, config.hidden_act,
                config.elementwise_affine, config.norm_eps, config.fuse_norm, layer_idx,
            )  # fmt: skip
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.hidden_ratio, config.intermediate_size)
        self.use_attnres = config.attnres_block_size is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        attnres_states: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        residual = hidden_states
        hidden_states, attentions, past_key_values = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **kwargs,
        )
        if self.config.fuse_norm:
            hidden_states, residual = self.mlp_norm(hidden_states, residual, True)
        else:
            residual = residual + hidden_states
            hidden_states = self.mlp_norm(residual)
        return residual + self.mlp(hidden_states, **kwargs), attentions, past_key_values, attnres_states


class RetNetPreTrainedModel(PreTrainedModel):
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RetNetBlock",)
    _supports_cache_class = True
    _is_stateful = True
    _input_embed_layer = "embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class RetNetModel(RetNetPreTrainedModel):
    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RetNetBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = (RMSNorm if config.fuse_norm else nn.RMSNorm)(config.hidden_size, eps=config.norm_eps)
        self.use_attnres = config.attnres_block_size is not None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and not isinstance(past_key_values, Cache):
            past_key_values = Cache()
        all_hidden_states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            all_hidden_states += (hidden_states,)
            hidden_states, _, past_key_values, _ = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                attnres_states=None,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        recorded = (*all_hidden_states, hidden_states) if output_hidden_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (hidden_states, past_key_values, recorded) if x is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values, hidden_states=recorded
        )


class FLAUnsupportedCacheGenerationMixin(GenerationMixin):
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: Any = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if logits_to_keep is not None:
            kwargs["logits_to_keep"] = logits_to_keep
        return super().prepare_inputs_for_generation(
            input_ids=input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration,
            use_cache=use_cache, **kwargs,
        )  # fmt: skip


class RetNetForCausalLM(RetNetPreTrainedModel, FLAUnsupportedCacheGenerationMixin):
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}  # type: ignore[misc]

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        **kwargs: Any,
    ) -> Any:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )
        hidden_states = outputs[0]
        if labels is None and isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits, loss = self.lm_head(hidden_states), None
        if labels is not None:
            shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        if not return_dict:
            return (logits, *outputs[1:]) if loss is None else (loss, logits, *outputs[1:])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip
