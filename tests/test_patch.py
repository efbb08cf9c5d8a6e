"""patch_model, unpatch_model and patch_report: what they change, what they put back, what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxForCausalLM,
    MiniMaxForQuestionAnswering,
    MiniMaxForSequenceClassification,
    MiniMaxForTokenClassification,
    MiniMaxModel,
    StaticCache,
)

import leet_hf.patch
import tiny
from leet_hf import (
    UnsupportedModelError,
    decay,
    patch_model,
    patch_report,
    register_adapter,
    unpatch_model,
    upgrade_cache,
)
from leet_hf.adapters import Adapter, Decay, Projected, RecurrentShape, adapters
from leet_hf.host import decoder_forward
from leet_hf.modes.helpers import perturbed

KINDS = (
    MiniMaxForCausalLM,
    MiniMaxModel,
    MiniMaxForSequenceClassification,
    MiniMaxForTokenClassification,
    MiniMaxForQuestionAnswering,
)
IDS = torch.tensor(tiny.prompts((21,)))


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All there is on every module of a model; its tensors and modules by identity."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if key in ("_parameters", "_buffers", "_modules") else value
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


def lightning(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "MiniMaxLightningAttention"]


@torch.no_grad()
def outputs(model: nn.Module, **options: Any) -> torch.Tensor:
    return model(IDS, **{"use_cache": False} | options)[0]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def skip_unless_stock_pickles() -> None:
    """Some versions of transformers (5.20) put a local function on their own models."""
    try:
        pickle.dumps(tiny.model())
    except AttributeError as error:
        pytest.skip(f"the stock model can not be pickled: {error}")


# What patching changes, and what it does not.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_head_gives_what_stock_gives(layout: str, kind: type) -> None:
    model = tiny.model(layout, kind=kind, pad_token_id=0)
    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    want, padded = outputs(model), outputs(model, attention_mask=mask)
    assert patch_model(model) is model
    same(outputs(model), want)
    real = slice(None) if kind is MiniMaxForSequenceClassification else slice(4, None)
    same(outputs(model, attention_mask=mask)[:, real], padded[:, real])
    same(outputs(model, use_cache=True), want)


def test_only_this_instance_changes() -> None:
    before = {cls: dict(cls.__dict__) for module in tiny.model().modules() for cls in type(module).__mro__}
    other = tiny.model()
    kept = snapshot(other)
    patch_model(tiny.model()).generate(IDS, max_new_tokens=2)
    assert snapshot(other) == kept
    for cls, attributes in before.items():
        assert {k: v for k, v in cls.__dict__.items() if not k.startswith("_abc")} == {
            k: v for k, v in attributes.items() if not k.startswith("_abc")
        }


def test_patching_twice_is_patching_once() -> None:
    model = patch_model(tiny.model())
    once = snapshot(model)
    assert patch_model(model) is model
    assert snapshot(model) == once
    assert patch_report(patch_model(model, method="torch")).layers[0].method == "torch"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_unpatching_restores_everything(kind: type) -> None:
    model = tiny.model(kind=kind)
    before, want = snapshot(model), outputs(model)
    assert unpatch_model(model) is model and snapshot(model) == before
    patch_model(model)
    assert snapshot(model) != before
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(outputs(model), want)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched_and_are_their_own(through: str) -> None:
    if through != "deepcopy":
        skip_unless_stock_pickles()
    model = patch_model(tiny.model())
    want = model.generate(IDS, max_new_tokens=20, do_sample=False)
    if through == "deepcopy":
        copied = copy.deepcopy(model)
    elif through == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert patch_report(copied).patched == 3
    for module in (copied.model, *lightning(copied)):
        assert module.forward.args[0] is module
    assert torch.equal(copied.generate(IDS, max_new_tokens=20, do_sample=False), want)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not outputs(copied).any() and outputs(model).any()
    unpatch_model(model)
    assert patch_report(copied).patched == 3
    unpatch_model(copied)
    assert all("forward" not in module.__dict__ for module in copied.modules())


def test_saved_files_are_those_of_stock(tmp_path: Path) -> None:
    stock, model = tiny.model(), patch_model(tiny.model())
    outputs(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    for name, saved in (("stock", stock), ("patched", model)):
        saved.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    assert "model.safetensors" in files and "config.json" in files
    for name in files:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    loaded = MiniMaxForCausalLM.from_pretrained(tmp_path / "patched")
    same(outputs(patch_model(loaded)), outputs(stock))
    model.load_state_dict(stock.state_dict())


# Decays.


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_stay_float32(dtype: torch.dtype, when: str) -> None:
    model = tiny.model("all-linear")
    model = patch_model(model.to(dtype)) if when == "before" else patch_model(model).to(dtype)
    assert model.model.layers[1].self_attn.slope_rate.dtype == dtype
    for layer, module in enumerate(lightning(model)):
        log_decay = module._leet.log_decay(module.out_proj.weight)
        want = torch.tensor(decay.minimax(4, layer, 4))
        assert log_decay.dtype == torch.float32 and torch.equal(log_decay, want)
    assert all(layer.decay.startswith("formula") for layer in patch_report(model).layers)
    output = model(IDS, use_cache=True)
    assert output.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32


def test_slopes_that_are_not_the_formula_are_kept() -> None:
    """A layer moved elsewhere, as pruning does, decays as where it came from."""
    model = tiny.model("all-linear")
    module = model.model.layers[1].self_attn
    slopes = module.slope_rate.flip(0) * 1.3
    tables = (slopes, *module.decay_factors(slopes))
    for name, value in zip(("slope_rate", "query_decay", "key_decay", "diagonal_decay"), tables, strict=True):
        getattr(module, name).copy_(value)
    want = outputs(model)
    same(outputs(patch_model(model)), want)
    assert [layer.decay.split()[0] for layer in patch_report(model).layers] == [
        "formula",
        "buffer",
        "formula",
        "formula",
    ]


@pytest.mark.parametrize(
    "slopes, message", [([1.0, 2.0], "has 2 entries for 4 heads"), ([1.0] * 3 + [-1.0], "negative")]
)
def test_slopes_that_can_not_be(slopes: list[float], message: str) -> None:
    model = tiny.model()
    model.model.layers[2].self_attn.slope_rate = nn.Buffer(torch.tensor(slopes)[:, None, None])
    refused(model, rf"model\.layers\.2\.self_attn: slope_rate .*{message}")


# Refusals: nothing may have changed.


def refused(model: nn.Module, message: str, error: type = UnsupportedModelError, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch_model(model, **options)
    assert snapshot(model) == before


def test_a_model_without_a_recognised_layer() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    message = r"(?s)LlamaForCausalLM has no linear-attention layer.*Supported:.*minimax: MiniMaxLightningAttention"
    refused(llama, message)
    with pytest.raises(UnsupportedModelError, match=message):
        patch_report(llama)
    assert unpatch_model(llama) is llama
    refused(tiny.model("softmax-first", layer_types=[tiny.SOFTMAX] * 4), "has no linear-attention layer")
    refused(tiny.model().model.layers, r"has 0\.self_attn, a MiniMaxLightningAttention, without the MiniMaxModel: pass")
    with pytest.raises(TypeError, match=r"model is a str, must be a torch\.nn\.Module"):
        patch_model("MiniMax")  # type: ignore[type-var]


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MiniMaxForCausalLM(tiny.config())
    refused(model, r"model\.layers\.0\.self_attn\.\S+ is on the meta device: load the weights first")
    model = tiny.model()
    model.model.layers[1].self_attn.out_proj.to("meta")
    refused(model, r"model\.layers\.1\.self_attn\.out_proj\.weight is on the meta device")


def _without_gate(model: Any) -> None:
    del model.model.layers[2].self_attn.output_gate


def _misnumbered(model: Any) -> None:
    model.model.layers[1].self_attn.layer_idx = 2


def _shortened(model: Any) -> None:
    model.model.layers = model.model.layers[:3]


def _retyped(model: Any) -> None:
    model.config.layer_types = tiny.LAYOUTS["softmax-first"]


def _replaced(model: Any) -> None:
    model.model.layers[0].self_attn.forward = tiny.model


@pytest.mark.parametrize(
    "change, message",
    [
        (_without_gate, r"model\.layers\.2\.self_attn is a MiniMaxLightningAttention, but it has no output_gate"),
        (_misnumbered, r"model\.layers\.1\.self_attn says it is layer 2 but is layer 1: number"),
        (_shortened, r"model is a MiniMaxModel, but it has 3 layers and its config\.num_hidden_layers is 4"),
        (_retyped, r"its layers\.0\.self_attn is a MiniMaxLightningAttention where config\.layer_types says 'full_att"),
        (_replaced, r"model\.layers\.0\.self_attn .* forward replaced already, by model: patch the model before that"),
    ],
)
def test_a_model_that_is_not_as_expected(change: Any, message: str) -> None:
    model = tiny.model()
    change(model)
    refused(model, message)


def test_an_unknown_method() -> None:
    refused(tiny.model(), "method is 'fast', must be one of 'auto', .*'torch'", ValueError, method="fast")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 2, 3, 4])
def test_an_exception_in_the_middle(calls: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, the base model, then generate()."""
    count = 0

    def failing(inner: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise error("no more")
            return inner(*args)

        return run

    for name in ("install_forward", "install_generation"):
        monkeypatch.setattr(leet_hf.patch, name, failing(getattr(leet_hf.patch, name)))
    refused(tiny.model(), "no more", error)  # type: ignore[arg-type]


# Reports.


def test_report() -> None:
    model = tiny.model()
    planned, patched = patch_report(model), patch_report(patch_model(model, method="torch"))
    assert (planned.patched, patched.patched) == (0, 3)
    assert [layer.status for layer in planned.layers] == ["not patched"] * 3 + ["left alone"]
    assert [layer.status for layer in patched.layers] == ["patched"] * 3 + ["left alone"]
    first, last = patched.layers[0], patched.layers[3]
    assert (first.name, first.index, first.adapter, first.method) == ("model.layers.0.self_attn", 0, "minimax", "torch")
    assert first.decay.startswith("formula -2^(-8(h+1)/H)")
    assert (last.index, last.adapter, last.reason) == (3, "", "MiniMaxAttention is no recurrent layer")
    assert planned.layers[0].method == "auto (torch)"
    text = str(patched)
    assert "3 of 4 attention layers patched" in text and "model (MiniMaxForCausalLM): generate()" in text
    assert all(len(line) == len(line.rstrip()) for line in text.splitlines())


# Hooks and wrappers.


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
                assert getattr(forward, "func", None) not in (leet_hf.patch.layer_forward, decoder_forward)
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
        patched = [name for name, module in model.named_modules() if "_leet" in module.__dict__]
        assert len(patched) == 5, "three layers, the base model and the model that generates"
        merged = unpatch_model(model.merge_and_unload())
        assert all("_leet" not in module.__dict__ for module in merged.modules())


# Forward.


def test_the_state_is_recorded_as_attention_while_decoding() -> None:
    model = patch_model(tiny.model("all-linear"))
    cache = model(IDS, use_cache=True).past_key_values
    output = model(IDS[:, :1], past_key_values=cache, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for i, state in enumerate(output.attentions):
        assert torch.equal(state, cache.layers[i].recurrent_states[0])
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(IDS).attentions) == 4
    model.config.output_attentions = False
    assert model(IDS).attentions is None


def test_one_graph_for_all_lengths_without_a_cache() -> None:
    model = patch_model(tiny.model())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (21, 9, 14):
            ids = torch.tensor([IDS[0, :length].tolist()])
            same(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert len(graphs) == 1
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        options = {"position_ids": positions, "use_cache": False}
        same(forward(IDS[:, :7], **options).logits, model(IDS[:, :7], **options).logits)


def test_a_compiled_copy() -> None:
    """What is pickled must still be traceable: instance forwards are unusual."""
    skip_unless_stock_pickles()
    torch._dynamo.reset()
    copied = pickle.loads(pickle.dumps(patch_model(tiny.model())))
    forward = torch.compile(copied, backend="eager", fullgraph=True)
    same(forward(IDS, use_cache=False)[0], outputs(copied))


BAD_FORWARDS = {
    "both": ({"inputs_embeds": torch.zeros(1, 21, 64)}, "input_ids and inputs_embeds: exactly one"),
    "neither": ({"input_ids": None}, "input_ids and inputs_embeds: exactly one"),
    "packed batch": ({"input_ids": IDS.view(3, 7), "cu_seq_lens_q": torch.tensor([0, 7])}, "with a batch of 3 rows"),
    "index": ({"seq_idx": torch.zeros(1, 20)}, r"seq_idx has shape \[1, 20\], must be \[1, 21\]"),
    "packed pads": (
        {"cu_seq_lens_q": torch.tensor([0, 4, 21]), "attention_mask": torch.arange(21)[None].clamp(max=1)},
        "attention_mask has pads and the sequences are packed",
    ),
}


@pytest.mark.parametrize("name", BAD_FORWARDS)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_bad_arguments_of_forward(layout: str, name: str) -> None:
    arguments, message = BAD_FORWARDS[name]
    model, cache = patch_model(tiny.model(layout)), DynamicCache(config=tiny.config(layout))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, "past_key_values": cache} | arguments)
    assert upgrade_cache(cache, model).get_seq_length() == 0


def test_packing_and_a_past_do_not_mix() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="packed sequences were given with past_key_values that hold tokens"):
            model(IDS[:, :4], past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 4]))
        assert {layer.get_seq_length() for layer in cache.layers} == {21}
    static = StaticCache(tiny.config(), max_cache_len=40)
    with pytest.raises(ValueError, match="packed sequences were given with a StaticCache"):
        patch_model(tiny.model())(IDS, past_key_values=static, seq_idx=torch.arange(21)[None] // 9)


def test_a_mask_of_ones_with_packed_sequences_is_no_padding() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        packing = {"cu_seq_lens_q": torch.tensor([0, 8, 21])}
        got = outputs(model, attention_mask=torch.ones_like(IDS), **packing)
        # Positions that do not restart do not make the sequences one.
        assert torch.equal(got, outputs(model, **packing))
        with torch.no_grad():
            same(got[:, 8:], model(IDS[:, 8:], use_cache=False).logits)
        shifted = outputs(model, position_ids=torch.arange(21)[None], **packing)
        with torch.no_grad():
            same(shifted[:, 8:], model(IDS[:, 8:], position_ids=torch.arange(8, 21)[None], use_cache=False).logits)


def test_a_layer_called_with_a_cache_it_can_not_use() -> None:
    module = lightning(patch_model(tiny.model()))[0]
    with pytest.raises(ValueError, match="has a DynamicLayer at layer 0, must be a RecurrentLayer"):
        module(torch.zeros(1, 3, 64), past_key_values=DynamicCache([(torch.zeros(1, 2, 3, 16),) * 2]))


@pytest.mark.parametrize(
    "first, second", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_inference_mode(layout: str, first: Any, second: Any) -> None:
    model, want = patch_model(tiny.model(layout)), outputs(tiny.model(layout))
    with first():
        cache = model(IDS[:, :18], use_cache=True).past_key_values
    with second():
        got = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(18, 21)]
    same(torch.cat(got, 1), want[:, 18:])


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_autocast_keeps_states_in_float32(layout: str) -> None:
    """Under autocast the keys are bfloat16; the state is that of these keys, to float32 precision."""
    model = patch_model(tiny.model(layout))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(IDS, use_cache=True)
        cache = model(IDS[:, :18], use_cache=True).past_key_values
        for i in range(18, 21):
            output = model(IDS[:, i : i + 1], past_key_values=cache)
        first = model.config.layer_types.index(tiny.LINEAR)
        state, want = (c.layers[first].recurrent_states[0] for c in (cache, whole.past_key_values))
    assert cache.layers[first].state.keys.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert first > 0 or torch.allclose(state, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1], rtol=0.1, atol=0.1)


def test_gradients_through_the_cache() -> None:
    """Two forwards with a cache, trained through, have the gradient of one forward."""
    model = patch_model(tiny.model())
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[:, -1].square().sum().backward()
    want, embeds.grad = embeds.grad, None
    cache = model(inputs_embeds=embeds[:, :18], use_cache=True).past_key_values
    model(inputs_embeds=embeds[:, 18:], past_key_values=cache).logits[:, -1].square().sum().backward()
    assert want is not None and embeds.grad is not None
    same(embeds.grad, want)


def test_drafts_longer_than_the_window() -> None:
    """Seventy candidates at once are held from the first forward on, however long the prompt."""
    model = patch_model(tiny.model())
    draft = perturbed(model, 0.02)
    draft.generation_config.update(
        num_assistant_tokens=70, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.0
    )
    ids = torch.tensor([tiny.prompts((40,))[0] * 3])
    want = model.generate(ids, max_new_tokens=150, do_sample=False)
    assert torch.equal(model.generate(ids, assistant_model=draft, max_new_tokens=150, do_sample=False), want)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=70, max_new_tokens=150, do_sample=False), want)


# Adapters from outside.


class GatedAttention(nn.Module):
    """A made-up recurrent module with decays per token."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.decay, self.out = nn.Linear(64, 96), nn.Linear(64, 2), nn.Linear(32, 64)
        self.layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        raise NotImplementedError("only patched")


class GatedModel(MiniMaxModel):
    """A base model of another name."""


class GatedAdapter(Adapter):
    name, layer_class, base_class, decay_formula = "gated", "GatedAttention", "GatedModel", "per token"
    base_forward = staticmethod(decoder_forward)

    def misfit(self, layer: nn.Module) -> str | None:
        return None

    def base_misfit(self, base: nn.Module) -> str | None:
        return None

    def index(self, layer: Any) -> int:
        return layer.layer_idx

    def shape(self, attention: nn.Module) -> RecurrentShape:
        return RecurrentShape(2, 2, 2, 16, 16)

    def decay(self, layer: nn.Module) -> Decay | None:
        return None

    def scale(self, layer: nn.Module) -> float:
        return 0.25

    def project(self, layer: Any, hidden_states: torch.Tensor, position_embeddings: Any) -> Projected:
        q, k, v = layer.project(hidden_states).unflatten(-1, (2, 48)).chunk(3, -1)
        return Projected(q, k, v, nn.functional.logsigmoid(layer.decay(hidden_states).float()))

    def finish(self, layer: Any, o: torch.Tensor, hidden_states: torch.Tensor, rest: Any) -> torch.Tensor:
        return layer.out(o.flatten(-2))


@pytest.fixture
def gated() -> Any:
    adapter = register_adapter(GatedAdapter())
    yield adapter
    del leet_hf.adapters._registry["gated"]


def test_an_adapter_from_outside(gated: Adapter) -> None:
    """Decays per token; decoding with a cache agrees with forwards without one."""
    assert adapters()[0] is gated
    torch.manual_seed(0)
    model = GatedModel(tiny.config("all-linear", num_hidden_layers=1, layer_types=[tiny.LINEAR])).eval()
    model.layers[0].self_attn = GatedAttention()
    patch_model(model)
    report = patch_report(model).layers
    assert [(layer.adapter, layer.decay, layer.status) for layer in report] == [("gated", "per token", "patched")]
    want = outputs(model)
    with torch.no_grad():
        cache = model(IDS[:, :18], use_cache=True).past_key_values
        same(model(IDS[:, 18:], past_key_values=cache).last_hidden_state, want[:, 18:])
    assert not torch.allclose(want, outputs(unpatch_and_repatch_shifted(model)))


def unpatch_and_repatch_shifted(model: Any) -> Any:
    """The same model with other decays: they do matter."""
    unpatch_model(model)
    with torch.no_grad():
        model.layers[0].self_attn.decay.bias.add_(3)
    return patch_model(model)


def test_registering_what_is_no_adapter(gated: Adapter) -> None:
    with pytest.raises(TypeError, match="must be an instance, not the class"):
        register_adapter(GatedAdapter)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be an instance of leet_hf\.adapters\.Adapter"):
        register_adapter("gated")  # type: ignore[arg-type]
    other = type("Other", (GatedAdapter,), {})()
    with pytest.raises(ValueError, match=r"'gated' is registered already \(GatedAdapter\): choose another name"):
        register_adapter(other)
    assert register_adapter(gated) is gated


def test_public_names() -> None:
    for name in leet_hf.__all__:
        assert getattr(leet_hf, name) is not None
    assert set(leet_hf.__all__) <= set(dir(leet_hf))
    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        _ = leet_hf.patch_modle
