"""RetNetConfig: every published variant of RetNet as data, under the field names of flash-linear-attention."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from .checks import OWN_MODE, check_config, reject_unknown
from .registration import register_models

RETENTION, SOFTMAX = "linear_attention", "full_attention"
# Fields that FLA does not have and that change the function; their defaults are its choices.
BEYOND_FLA = (
    "position_embedding", "rope_theta", "decay", "retention_scale", "gate_act", "norm_type", "head_norm_type",
    "mlp_type", "mlp_bias", "attention_bias", "subln", "deepnorm", "scale_embeddings", "norm_embeddings",
)  # fmt: skip


class RetNetConfig(PreTrainedConfig):
    """Configuration of a RetNet (Sun et al., "Retentive Network", arXiv 2307.08621).

    The first group of fields is that of flash-linear-attention (FLA), with its names, meanings and defaults: its
    `config.json` is read as it is. The second group says what torchscale and its Hugging Face port (syncdoth/RetNet) do
    differently; its defaults are FLA's choices. Every ValueError names the field, what it was and what it must be.

    FLA's fields:
        vocab_size, hidden_size, num_hidden_layers, num_heads: sizes. num_kv_heads: heads of k and v, each shared by
            num_heads / num_kv_heads heads of q; None: num_heads.
        expand_k, expand_v: key and value dims of all heads together, in units of hidden_size.
        intermediate_size: of the MLP; None: `2/3 * hidden_ratio * hidden_size`, rounded up to a multiple of 256.
        hidden_ratio: see intermediate_size; None: 4.
        hidden_act: activation of the MLP and, unless gate_act is given, of the output gate.
        feature_map: activation of q and k before positions are put in, or None.
        use_output_gate: whether `act(g_proj(x))` multiplies the normalised heads. elementwise_affine: whether the norm
            of the heads has a weight. norm_eps: of every norm.
        fuse_norm: with a swish gate, the norm of the heads is named `g_norm_swish_gate`, else `g_norm`.
        attn: layers with softmax attention instead, {"layers": [3], "num_heads": 8, "num_kv_heads": 8, "qkv_bias":
            False, "rope_theta": 10000.0}, a list of such, or None.
        max_position_embeddings, use_cache, initializer_range, tie_word_embeddings and token ids: as usual.
        attn_mode, fuse_swiglu, fuse_cross_entropy, fuse_linear_cross_entropy, use_l2warp, use_short_conv, conv_size:
            kept for FLA. They choose its kernels, or have no effect there either; here `method` chooses. Where a field
            of our own changes the function, attn_mode becomes "leet_hf": FLA, which knows no such field, refuses that.

    Fields of our own:
        position_embedding: "rope" (halves are rotated, angles theta^(-2i/D)) or "theta_shift" (neighbours are rotated,
            angles theta^-linspace(0, 1, D/2)). rope_theta: theta.
        decay: "retnet", `1 - 2^(-5-h)`, or "retnet_language_model", `1 - exp(linspace(log 1/32, log 1/512, H))`.
        retention_scale: what divides the output of a head before its norm, which cancels it but for norm_eps. "none"
            (FLA); "decay": sqrt of the sum of the decays so far (torchscale, recurrent form); "score": that, times the
            sum of scores if above 1 (torchscale, parallel form, which its checkpoints were trained in).
        gate_act: activation of the output gate; None: hidden_act.
        norm_type: "rmsnorm" or "layernorm", of layers and model. head_norm_type: the same, of the heads.
        mlp_type: "glu" (`down(act(gate(x)) * up(x))`) or "ffn" (`down(act(up(x)))`). mlp_bias, attention_bias: whether
            their projections have biases.
        subln: a norm inside the MLP, before its last projection (Sub-LN, Wang et al., arXiv 2210.06423); subln_type:
            "layernorm" or "rmsnorm".
        normalize_before: norm before (True) or after (False) each residual; None: before, unless deepnorm.
        deepnorm: residuals times `(2 L)^(1/4)`, norm after, initial weights smaller (Wang et al., arXiv 2203.00555).
        scale_embeddings: embeddings times sqrt(hidden_size). norm_embeddings: an RMSNorm (or LayerNorm) after them.
        dropout, activation_dropout, drop_path_rate: while training; the last grows from 0 over the layers.
        method: of the operator: "auto" or one of `leet_linear_attention.available_methods()`.

    Raises ValueError for unknown or contradictory options, and for head counts that do not divide their dims.
    """

    model_type = "retnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]  # a list: Trainer adds to it
    attribute_map = {"num_attention_heads": "num_heads", "num_key_value_heads": "kv_heads"}  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 8
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    hidden_ratio: float | None = 2
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    feature_map: str | None = None
    use_output_gate: bool = True
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    max_position_embeddings: int = 2048
    use_cache: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    attn_mode: str = "chunk"
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    use_short_conv: bool = False
    conv_size: int = 4
    attnres_block_size: int | None = None

    position_embedding: str = "rope"
    rope_theta: float = 10000.0
    decay: str = "retnet"
    retention_scale: str = "none"
    gate_act: str | None = None
    norm_type: str = "rmsnorm"
    head_norm_type: str = "rmsnorm"
    mlp_type: str = "glu"
    mlp_bias: bool = False
    attention_bias: bool = False
    subln: bool = False
    subln_type: str = "layernorm"
    normalize_before: bool | None = None
    deepnorm: bool = False
    scale_embeddings: bool = False
    norm_embeddings: bool = False
    dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.0
    method: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        reject_unknown(kwargs)
        self.attn = check_config(self)
        super().__post_init__(**kwargs)
        if not self.norm_first or any(getattr(self, name) != getattr(RetNetConfig, name) for name in BEYOND_FLA):
            self.attn_mode = OWN_MODE
        elif self.attn_mode == OWN_MODE:
            self.attn_mode = RetNetConfig.attn_mode
        if self.subln:
            self.base_model_tp_plan = {}  # type: ignore[misc]  # its norm needs all of the MLP's inner dim
        register_models()  # whoever has a config can have its model from the Auto classes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_models()

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, in transformers' words: "linear_attention" (retention) or "full_attention"."""
        softmax = {layer for spec in self.softmax_specs for layer in spec["layers"]}
        return [SOFTMAX if layer in softmax else RETENTION for layer in range(self.num_hidden_layers)]

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        """Dims of one head of q and k."""
        return round(self.hidden_size * self.expand_k) // self.num_heads

    @property
    def value_dim(self) -> int:
        """Dims of one head of v."""
        return round(self.hidden_size * self.expand_v) // self.num_heads

    @property
    def mlp_size(self) -> int:
        """The MLP's inner size: intermediate_size, or what FLA makes of hidden_ratio."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return 256 * math.ceil(int(self.hidden_size * ratio * 2 / 3) / 256)

    @property
    def gate_activation(self) -> str:
        """Activation of the output gate."""
        return self.hidden_act if self.gate_act is None else self.gate_act

    @property
    def norm_first(self) -> bool:
        """Whether a layer normalises its input rather than its sum."""
        return not self.deepnorm if self.normalize_before is None else self.normalize_before

    @property
    def residual_scale(self) -> float:
        """What a residual is multiplied with: DeepNorm's alpha, `(2 L)^(1/4)`, or 1."""
        return (2.0 * self.num_hidden_layers) ** 0.25 if self.deepnorm else 1.0

    @property
    def init_scale(self) -> float:
        """Factor of some initial weights: `(8 L)^(-1/4)` with DeepNorm, `sqrt(log 2 L)` with Sub-LN, else 1."""
        if self.deepnorm:
            return (8.0 * self.num_hidden_layers) ** -0.25
        return math.sqrt(math.log(2 * self.num_hidden_layers)) if self.subln else 1.0

    @property
    def softmax_specs(self) -> list[dict[str, Any]]:
        """`attn` as a list, each entry with all its keys."""
        return [] if self.attn is None else [self.attn] if isinstance(self.attn, dict) else self.attn
