"""The recurrent cache layer and `attend`: against the operator over the whole history, and against wrong use."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import tiny
from leet_hf import patch_model, upgrade_cache
from leet_hf.attend import attend
from leet_hf.cache import BUFFER, WIDEST, WINDOW, RecurrentLayer
from leet_hf.packing import find_packing, sequence_index
from leet_hf.shapes import RecurrentShape, SoftmaxShape
from leet_hf.static_cache import StaticRecurrentLayer
from leet_hf.upgrade import upgrade
from leet_linear_attention import linear_attention

HEADS, KEY, VALUE = 4, 8, 6
SPEC = (RecurrentShape(HEADS, 2, HEADS, KEY, VALUE), SoftmaxShape(2, 16))
LOG_DECAY = torch.tensor([-0.01, -0.1, -0.5, -2.0])


class Tokens:
    """Random q, k, v [B, T, h, D] that go on from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
        shapes = ((HEADS, KEY), (2, KEY), (HEADS, VALUE))
        return tuple(torch.randn(batch, tokens, *shape, generator=self.generator) for shape in shapes)


class History:
    """A layer beside all the tokens it should remember, from which its outputs and state are computed anew."""

    def __init__(self, layer: RecurrentLayer, batch: int = 2) -> None:
        self.layer, self.draw = layer, Tokens()
        self.past = self.draw(batch, 0)

    def forward(self, tokens: int) -> None:
        new = self.draw(len(self.past[0]), tokens)
        self.past = tuple(torch.cat([old, x], 1) for old, x in zip(self.past, new, strict=True))
        o, state = attend(*new, LOG_DECAY, scale=0.5, layer=self.layer, return_state=True)
        want, want_state = linear_attention(*self.past, LOG_DECAY, scale=0.5, output_final_state=True)
        torch.testing.assert_close(o, want[:, want.shape[1] - tokens :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
        self.check()

    def change(self, change: Any) -> None:
        self.past = tuple(change(x) for x in self.past)

    def check(self) -> None:
        layer, length = self.layer, self.past[0].shape[1]
        assert int(layer.get_seq_length()) == length
        if layer.state is None:
            assert length == 0
            return
        _, want = linear_attention(*self.past, LOG_DECAY, output_final_state=True)
        torch.testing.assert_close(layer.current_state(), want, rtol=1e-4, atol=1e-4)
        if type(layer) is RecurrentLayer:
            assert int(layer.state.cursor[1]) == layer._held, "the host's counter is the device's"
            assert layer.batch_size == len(self.past[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("recording", ["no", "first", "later", "growing"])
def test_any_sequence_of_uses(recording: str, seed: int) -> None:
    """Forwards of all lengths, taken back, reordered, selected, repeated and reset, at random."""
    layer = RecurrentLayer(SPEC, 0)
    history = History(layer)
    if recording == "growing":
        layer.record(0, grows=True)
    if recording in ("first", "growing"):
        layer.activate_past_recording()
    choose = torch.Generator().manual_seed(seed)

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=choose))]

    for turn in range(40):
        if recording == "later" and turn == 15:
            layer.activate_past_recording()
        use = one_of("forward", "forward", "forward", "forward", "crop", "crop", "reorder", "select", "repeat", "reset")
        batch = len(history.past[0])
        if use == "forward":
            history.forward(one_of(1, 1, 1, 2, 5, BUFFER, BUFFER + 1, WINDOW, WINDOW + 1, 100))
        elif use == "crop" and layer.state is not None:
            removed = min(one_of(0, 1, 3, 10, 64), layer._held)
            layer.crop(-removed)
            history.change(lambda x, removed=removed: x[:, : x.shape[1] - removed])
        elif use == "reorder":
            index = torch.randint(batch, (batch,), generator=choose)
            layer.reorder_cache(index)
            history.change(lambda x, index=index: x[index])
        elif use == "select":
            index = torch.randint(batch, (one_of(1, 2, 3),), generator=choose)
            layer.batch_select_indices(index)
            history.change(lambda x, index=index: x[index])
        elif use == "repeat" and batch < 8:
            layer.batch_repeat_interleave(2)
            history.change(lambda x: x.repeat_interleave(2, 0))
        elif use == "reset" and one_of(True, False):
            layer.reset()
            history.past = history.draw(one_of(1, 2, 3), 0)
        history.check()


def test_a_recorded_prompt_can_be_taken_back_by_the_window() -> None:
    layer = RecurrentLayer(SPEC, 0)
    layer.activate_past_recording()
    history = History(layer)
    history.forward(200)
    layer.crop(-WINDOW)
    history.change(lambda x: x[:, :-WINDOW])
    history.check()
    history.forward(7)


@pytest.mark.parametrize("window", [65, 100])
def test_a_wider_window(window: int) -> None:
    layer = RecurrentLayer(SPEC, 0)
    layer.activate_past_recording()
    layer.record(window, grows=True)
    history = History(layer)
    history.forward(300)
    layer.crop(-window)
    history.change(lambda x: x[:, :-window])
    history.check()


def test_a_draft_longer_than_the_window_is_kept_until_the_crop() -> None:
    """Token by token, as an assistant writes; a layer that does not grow keeps the window."""
    for grows, kept in ((True, WIDEST), (False, WINDOW)):
        layer = RecurrentLayer(SPEC, 0)
        layer.record(0, grows)
        layer.activate_past_recording()
        history = History(layer, batch=1)
        history.forward(150)
        assert layer.state is not None and layer.state.keep == WINDOW
        for _ in range(110):
            history.forward(1)
        assert layer.state.keep == kept
        removed = 110 if grows else WINDOW
        layer.crop(-removed)
        history.change(lambda x, removed=removed: x[:, :-removed])
        history.check()


def test_taking_back_more_than_is_held() -> None:
    layer = RecurrentLayer(SPEC, 0)
    history = History(layer)
    history.forward(40)
    history.forward(3)
    with pytest.raises(
        RuntimeError, match=r"cache layer 0 .* take back 4 tokens but holds the last 3: call .*recording"
    ):
        layer.crop(-4)
    history.check()
    layer.crop(-3)
    with pytest.raises(ValueError, match="crop was asked for 2, must be 0 or negative"):
        layer.crop(2)
    layer.activate_past_recording()
    history.change(lambda x: x[:, :-3])
    history.forward(90)
    with pytest.raises(RuntimeError, match="at most 64 tokens at a time"):
        layer.crop(-65)
    history.check()


def test_taking_back_everything_is_a_reset() -> None:
    layer = RecurrentLayer(SPEC, 0)
    history = History(layer)
    history.forward(40)
    layer.crop(-40)
    history.change(lambda x: x[:, :0])
    assert not layer.has_tokens
    history.check()
    history.forward(3)


def test_static_layer_keeps_its_addresses() -> None:
    layer = StaticRecurrentLayer(SPEC, 0, 500)
    history = History(layer)
    history.forward(20)
    state = layer.state
    assert state is not None
    tensors = (state.base, state.keys, state.values, state.log_decays, state.cursor, layer.cumulative_length)
    before = [x.data_ptr() for x in tensors]
    history.forward(1)
    history.forward(30)
    layer.reorder_cache(torch.tensor([1, 0]))
    history.change(lambda x: x[[1, 0]])
    history.check()
    layer.reset()
    history.change(lambda x: x[:, :0])
    assert int(layer.get_seq_length()) == 0 and not layer.has_tokens
    history.forward(20)
    after = (state.base, state.keys, state.values, state.log_decays, state.cursor, layer.cumulative_length)
    assert [x.data_ptr() for x in after] == before
    assert layer.get_mask_sizes(1) == (500, 0) and layer.get_max_length() == 500
    with pytest.raises(RuntimeError, match="use a DynamicCache to crop"):
        layer.crop(-1)


def test_what_transformers_reads() -> None:
    layer = RecurrentLayer(SPEC, 0)
    assert layer.recurrent_states == {0: None} and not layer.has_previous_state[0]
    assert not hasattr(layer, "batch_size") and layer.get_mask_sizes(5) == (5, 0)
    history = History(layer)
    history.forward(21)
    assert layer.has_previous_state == {0: True} and layer.get_mask_sizes(5) == (26, 0)
    state = layer.recurrent_states[0]
    assert state is not None and state.shape == (2, HEADS, KEY, VALUE) and state.dtype == torch.float32
    state.zero_()  # a copy
    history.check()
    layer.offload()
    layer.prefetch()
    history.check()
    for use in (layer.update, layer.update_conv_state, layer.update_recurrent_state):
        with pytest.raises(ValueError, match="give every other model a cache of its own"):
            use(state)
    with pytest.raises(ValueError, match="recurrent_states was assigned"):
        layer.recurrent_states = {0: state}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(copied: Any) -> None:
    history = History(RecurrentLayer(SPEC, 0))
    history.forward(21)
    other = copy.copy(history)
    other.layer, other.draw = copied(history.layer), Tokens(7)
    other.forward(3)
    history.forward(18)
    other.forward(2)


def test_inference_mode_then_not() -> None:
    for layer in (RecurrentLayer(SPEC, 0), StaticRecurrentLayer(SPEC, 0, None)):
        with torch.inference_mode():
            history = History(layer)
            history.forward(20)
            history.layer.batch_repeat_interleave(2)
            history.change(lambda x: x.repeat_interleave(2, 0).clone())
        with torch.no_grad():
            history.past = tuple(x.clone() for x in history.past)
            history.forward(1)
        with torch.inference_mode():
            history.forward(30)


def test_gradients_flow_through_the_cache() -> None:
    """Three forwards with one cache have the gradients of one forward."""
    inputs = [x.requires_grad_() for x in Tokens()(2, 30)]
    weights = torch.randn(2, 30, HEADS, VALUE, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((linear_attention(*inputs, LOG_DECAY)[0] * weights).sum(), inputs)
    layer = RecurrentLayer(SPEC, 0)
    pieces = [attend(*(x[:, a:b] for x in inputs), LOG_DECAY, layer=layer)[0] for a, b in ((0, 20), (20, 21), (21, 30))]
    got = torch.autograd.grad((torch.cat(pieces, 1) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # and decoding goes on from there
        history = History(layer)
        history.past = tuple(x.detach() for x in inputs)
        history.forward(1)


# Padding and packing.


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("log_decay", [None, LOG_DECAY, "per token"])
def test_pads_anywhere_change_nothing(log_decay: Any, cached: bool) -> None:
    q, k, v = Tokens()(1, 12)
    decay = -torch.rand(1, 12, HEADS) if log_decay == "per token" else log_decay
    real = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0]).bool()
    poisoned = [x.masked_fill(~real[None, :, None, None], float("nan")) for x in (q, k, v)]
    layer = RecurrentLayer(SPEC, 0) if cached else None
    o, state = attend(*poisoned, decay, mask=real[None].long(), layer=layer, return_state=True)
    short = decay[:, real] if log_decay == "per token" else decay
    want, want_state = linear_attention(*(x[:, real] for x in (q, k, v)), short, output_final_state=True)
    torch.testing.assert_close(o[:, real], want)
    torch.testing.assert_close(state, want_state)
    assert not o[:, ~real].any()


@pytest.mark.parametrize("length", [3, 30])
@pytest.mark.parametrize("cached", ["no", "yes", "recording"])
@pytest.mark.parametrize("by", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_do_not_leak(by: str, cached: str, length: int) -> None:
    """Also empty ones, and decays so slow that nothing would be forgotten by itself."""
    lengths = [length, 0, 2 * length, 1, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = Tokens()(1, sum(lengths))
    decay = torch.full((HEADS,), -1e-6)
    layer = None if cached == "no" else RecurrentLayer(SPEC, 0)
    if cached == "recording":
        layer.activate_past_recording()
    packing = {"cu_seqlens": bounds} if by == "cu_seqlens" else {"seq_idx": sequence_index(bounds, sum(lengths))}
    o, state = attend(q, k, v, decay, layer=layer, return_state=True, **packing)
    for a, b in itertools.pairwise(bounds):
        want, want_state = linear_attention(*(x[:, a:b] for x in (q, k, v)), decay, output_final_state=True)
        torch.testing.assert_close(o[:, a:b], want, rtol=1e-5, atol=1e-5)
        last = want_state if a < b else last  # noqa: F821
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    undecayed, _ = attend(q, k, v, None, seq_idx=sequence_index(bounds, sum(lengths)))
    torch.testing.assert_close(undecayed, o, rtol=1e-3, atol=1e-3)


def test_a_large_value_before_a_boundary_is_gone_after_it() -> None:
    q, k, v = Tokens()(1, 6)
    v[:, :3] = 1e30
    o, _ = attend(q, k, v, LOG_DECAY, seq_idx=torch.tensor([[0, 0, 0, 5, 5, 5]]))
    want, _ = linear_attention(q[:, 3:], k[:, 3:], v[:, 3:], LOG_DECAY)
    torch.testing.assert_close(o[:, 3:], want)


def test_find_packing() -> None:
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    found = find_packing(bounds, None, None, 1, 5, look_at_positions=False)
    assert found is not None
    assert found.seq_idx.tolist() == [[0, 0, 2, 2, 2]] and found.positions.tolist() == [[0, 1, 0, 1, 2]]
    positions = torch.tensor([[4, 5, 0, 1, 2]])
    found = find_packing(None, None, positions, 2, 5, look_at_positions=True)
    assert found is not None and found.positions.tolist() == [[0, 1, 0, 1, 2]] * 2
    assert find_packing(None, None, positions, 2, 5, look_at_positions=False) is None
    assert find_packing(None, None, torch.arange(3, 8)[None], 2, 5, look_at_positions=True) is None
    with pytest.raises(ValueError, match="cu_seq_lens_q was given with a batch of 2 rows: pack"):
        find_packing(bounds, None, None, 2, 5, look_at_positions=True)
    with pytest.raises(ValueError, match=r"seq_idx has shape \[1, 4\], must be \[1, 5\]"):
        find_packing(None, torch.zeros(1, 4), None, 1, 5, look_at_positions=True)


# Standard caches.


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_upgrading_standard_caches(layout: str) -> None:
    config = tiny.config(layout)
    model = patch_model(tiny.model(layout))
    for cache in (
        DynamicCache(config=config),
        DynamicCache(),
        StaticCache(config, max_cache_len=30),
        DynamicCache(config=config, offloading=True),
    ):
        cache.activate_past_recording()
        before = list(cache.layers)
        assert upgrade_cache(cache, model) is cache
        assert len(cache.layers) == 4
        for i, kind in enumerate(config.layer_types):
            static = isinstance(cache, StaticCache)
            if kind == tiny.LINEAR:
                assert type(cache.layers[i]) is (StaticRecurrentLayer if static else RecurrentLayer)
                assert cache.layers[i].record_past == (not static and bool(before))
            elif before:
                assert cache.layers[i] is before[i], "softmax layers stay transformers' own"
        after = list(cache.layers)
        upgrade_cache(cache, model)
        assert all(a is b for a, b in zip(cache.layers, after, strict=True))
        assert cache.is_compileable == isinstance(cache, StaticCache)
        assert cache.get_seq_length() == 0


def test_a_static_cache_allocated_early_is_upgraded_so() -> None:
    """A compiled prefill must find its tensors: they can not be made in a graph."""
    model = patch_model(tiny.model())
    cache = StaticCache(model.config, max_cache_len=30)
    cache.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    upgrade_cache(cache, model)
    assert cache.is_initialized and cache.layers[0].state.base.shape == (3, 4, 16, 16)
    later = upgrade_cache(StaticCache(model.config, max_cache_len=30), model)
    later.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    assert later.is_initialized and later.layers[0].state.base.shape == (3, 4, 16, 16)


@torch.no_grad()
def used(layout: str, **changes: Any) -> DynamicCache:
    """A cache of four tokens of another model."""
    model = patch_model(tiny.model(layout, **changes))
    return model(torch.arange(4)[None], use_cache=True).past_key_values


def contents(layers: list[Any]) -> list[Any]:
    """The tensors of a cache, and its lengths."""
    recurrent = [(x.current_state(), x.get_seq_length()) for x in layers if isinstance(x, RecurrentLayer)]
    return recurrent + [(x.keys, x.values) for x in layers if isinstance(x, DynamicLayer)]


REFUSED = {
    "of the stock model": (MiniMaxCache, "MiniMaxCache, the cache of the stock model"),
    "a tuple": (lambda: ((torch.zeros(1, 2, 3, 4),) * 2,) * 4, "is a tuple, must be a DynamicCache or StaticCache"),
    "of another layout": (lambda: used("softmax-first"), "layer 0 .DynamicLayer. holds"),
    "of other heads": (lambda: used("linear-first", num_attention_heads=2), "layer 0 .RecurrentLayer. holds .*heads=2"),
    "of other softmax heads": (lambda: used("linear-first", num_key_value_heads=4), "layer 0 .* holds"),
    "of fewer layers": (lambda: DynamicCache([(torch.zeros(1, 2, 0, 16),) * 2] * 3), "has 3 layers .* has 4"),
    "empty, of another layout": (
        lambda: DynamicCache(config=tiny.config("all-linear")),
        "layer 3 is a LinearAttention",
    ),
    "of a softmax model": (
        lambda: DynamicCache([(torch.zeros(1, 2, 3, 16),) * 2] * 4),
        "layer 0 .* another model wrote",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_of_another_model_is_refused_and_left_alone(name: str) -> None:
    make, message = REFUSED[name]
    model = patch_model(tiny.model("linear-first"))
    cache = make()
    layers = list(getattr(cache, "layers", ()))
    before = copy.deepcopy(contents(layers))
    with pytest.raises(ValueError, match=f"(?s)past_key_values .*{message}.*: pass no past_key_values"):
        model(torch.arange(4)[None], past_key_values=cache)
    if layers:
        assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
        torch.testing.assert_close(contents(layers), before)


def test_a_cache_of_another_batch_is_refused_and_left_alone() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        cache = model(torch.arange(4)[None], use_cache=True).past_key_values
        for _ in range(2):
            with pytest.raises(ValueError, match="past_key_values holds 1 rows but the input has 2: use"):
                model(torch.arange(8).view(2, 4), past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [4] * 4


def test_softmax_keys_of_the_wrong_shape_are_refused() -> None:
    cache = used("linear-first")
    cache.layers[0].spec = ()
    cache.layers[0].has_previous_state[0] = False
    cache.layers[3].keys = cache.layers[3].keys[..., :8]
    with pytest.raises(ValueError, match=r"layer 3 holds SoftmaxShape\(key_value_heads=2, head_dim=8\)"):
        upgrade(cache, patch_model(tiny.model("linear-first")).model._leet.spec)


def test_layers_that_have_seen_other_tokens_are_refused() -> None:
    cache = DynamicCache(config=tiny.config("softmax-first"))
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match=r"layers hold \[0, 3\] tokens"):
        patch_model(tiny.model("softmax-first"))(torch.arange(4)[None], past_key_values=cache)


@pytest.mark.parametrize(("layout", "stays_offloading"), [("linear-first", False), ("softmax-first", True)])
def test_a_lone_softmax_layer_is_not_offloaded(layout: str, stays_offloading: bool) -> None:
    """It would be fetched while it is read: offloading fetches the next softmax layer, which is the same one."""
    model = patch_model(tiny.model(layout))
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # what `offloading=True` sets, on machines that have a device to offload from
    upgrade_cache(cache, model)
    assert cache.offloading is stays_offloading
