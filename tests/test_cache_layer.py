"""The recurrent cache layer, against the operator over the whole history, and against wrong use."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from leet_hf.attend import attend
from leet_hf.cache import BUFFER, WIDEST, WINDOW, RecurrentLayer
from leet_hf.growing import GrowingLayer
from leet_hf.static_cache import StaticRecurrentLayer
from leet_linear_attention import linear_attention
from recurrent import HEADS, KEY, LOG_DECAY, SPEC, VALUE, History, Tokens


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("recording", ["no", "first", "later", "growing", "noted"])
def test_any_sequence_of_uses(recording: str, seed: int) -> None:
    """Forwards of all lengths, taken back, reordered, selected, repeated and reset, at random."""
    layer = RecurrentLayer(SPEC, 0)
    history = History(layer)
    if recording in ("growing", "noted"):
        layer.record(0, grows=True)
    if recording in ("first", "growing", "noted"):
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
            layer.lent = recording == "noted"
            layer.crop(-removed)
            if layer.lent and one_of(True, False) and layer._held > 2:
                layer.crop(-2)
                removed += 2
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
        if recording != "noted" or one_of(True, False):  # the check wants the state
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


class OnDevice(torch.Tensor):
    """A tensor that says it is on no CPU, and counts how often its number is asked for."""

    is_cpu = False  # type: ignore[assignment]
    asked = 0

    def __int__(self) -> int:
        OnDevice.asked += 1
        return int(self.as_subclass(torch.Tensor))


def test_a_number_on_a_device_is_asked_for_once() -> None:
    """Transformers 5.17 crops by a tensor, the same for every layer: each question would wait for the device."""
    layers: list[Any] = [RecurrentLayer(SPEC, 0), RecurrentLayer(SPEC, 0), GrowingLayer()]
    draw = Tokens()
    for layer in layers[:2]:
        attend(*draw(1, 9), LOG_DECAY, layer=layer)
    layers[2].update(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4))
    OnDevice.asked = 0
    number = torch.tensor(-2).as_subclass(OnDevice)
    for layer in layers:
        layer.crop(number)
    assert OnDevice.asked == 1 and [layer.get_seq_length() for layer in layers] == [7, 7, 7]
    number.sub_(1)  # the same tensor, another number
    for layer in layers:
        layer.crop(number)
    assert OnDevice.asked == 2 and [layer.get_seq_length() for layer in layers] == [4, 4, 4]
    for layer in layers:
        with pytest.raises(ValueError, match="crop was asked for 1, must be 0 or negative"):
            layer.crop(torch.tensor(1).as_subclass(OnDevice))
        with torch.inference_mode():
            layer.crop(torch.tensor(-1).as_subclass(OnDevice))
    assert [layer.get_seq_length() for layer in layers] == [3, 3, 3]


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
