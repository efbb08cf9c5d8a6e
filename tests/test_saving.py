"""save_cache and load_cache: resumed decoding is that of the cache itself; other models and bad files are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

import tiny
import tiny_retnet
from leet_hf import load_cache, patch_model, save_cache
from leet_hf.cache import RecurrentLayer
from leet_hf.versions import CACHE, cache_of

IDS = torch.tensor(tiny.prompts((23, 23)))


def forward(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
    with torch.no_grad():
        output = model(ids, use_cache=True, **{CACHE: cache})
    return output.logits, cache_of(output)


def filled(model: Any, cache: Any = None) -> Any:
    """A cache after a prompt, and steps enough to leave some tokens in the buffer."""
    _, cache = forward(model, IDS[:, :17], cache)
    for at in range(17, 20):
        _, cache = forward(model, IDS[:, at : at + 1], cache)
    return cache


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = patch_model(tiny.model("linear-first"))
    return model, save_cache(filled(model), tmp_path_factory.mktemp("saved") / "cache.safetensors", model)


MODELS = {
    **{layout: lambda layout=layout: patch_model(tiny.model(layout)) for layout in tiny.LAYOUTS},
    "retnet": tiny_retnet.model,
    "retnet-hybrid": lambda: tiny_retnet.model("hybrid"),
    "bfloat16": lambda: patch_model(tiny.rounded().bfloat16()),
}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_cache_goes_on_as_the_one_that_was_saved(name: str, static: bool, tmp_path: Path) -> None:
    model = MODELS[name]()
    cache = filled(model, StaticCache(config=model.config, max_cache_len=32) if static else None)
    path = save_cache(cache, tmp_path / "cache.safetensors", model)
    again = load_cache(path, model)
    assert type(again) is type(cache)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
    assert int(again.get_seq_length()) == int(cache.get_seq_length()) == 20
    for at in range(20, 23):
        want, cache = forward(model, IDS[:, at : at + 1], cache)
        got, again = forward(model, IDS[:, at : at + 1], again)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_saving_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    model = patch_model(tiny.model("linear-first"))
    one, other = filled(model), filled(model)
    save_cache(one, tmp_path / "cache.safetensors", model)
    got, want = forward(model, IDS[:, 20:], one)[0], forward(model, IDS[:, 20:], other)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_tokens_of_a_recording_cache_can_be_taken_back_after_loading(tmp_path: Path) -> None:
    model = patch_model(tiny.model("linear-first"))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    cache = filled(model, cache)
    again = load_cache(save_cache(cache, tmp_path / "cache.safetensors", model), model)
    for each in (cache, again):
        each.crop(-5)
    torch.testing.assert_close(forward(model, IDS[:, 15:], again)[0], forward(model, IDS[:, 15:], cache)[0])
    assert all(layer.record_past for layer in again.layers if isinstance(layer, RecurrentLayer))


def test_an_empty_cache_and_one_of_many_continuations(tmp_path: Path) -> None:
    model = patch_model(tiny.model("all-linear"))
    _, cache = forward(model, IDS[:1, :17])
    cache.reset()
    again = load_cache(save_cache(cache, tmp_path / "empty.safetensors", model), model)
    torch.testing.assert_close(forward(model, IDS[:, :17], again)[0], forward(model, IDS[:, :17])[0])

    path = save_cache(forward(model, IDS[:1, :17])[1], tmp_path / "prefix.safetensors", model)
    alone = [forward(model, ids[None], load_cache(path, model))[0] for ids in IDS[:, 17:]]
    forked = load_cache(path, model)
    forked.batch_repeat_interleave(2)
    torch.testing.assert_close(forward(model, IDS[:, 17:], forked)[0], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_generate_goes_on_from_a_loaded_cache(tmp_path: Path) -> None:
    model = patch_model(tiny.model("linear-first"))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(IDS[:1], **options)
    path = save_cache(cache_of(first), tmp_path / "chat.safetensors", model)
    want = model.generate(first.sequences, **options, **{CACHE: copy.deepcopy(cache_of(first))}).sequences
    for _ in range(2):
        assert torch.equal(
            model.generate(first.sequences, **options, **{CACHE: load_cache(path, model)}).sequences, want
        )


def refused(path: Path, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_cache(path, model)


def test_another_model_is_refused_with_what_differs(saved: tuple[Any, Path]) -> None:
    model, path = saved
    refused(path, patch_model(tiny.model("linear-first", head_dim=24)), "its config says other things")
    refused(path, patch_model(tiny.model("linear-first", seed=1)), "its weights have other values")
    refused(path, patch_model(tiny.model("linear-first").bfloat16()), "other names, shapes or dtypes")
    refused(path, tiny_retnet.model(), "of another model, a MiniMaxModel")
    trained = patch_model(copy.deepcopy(model))
    with torch.no_grad():
        trained.model.layers[1].self_attn.qkv_proj.weight.mul_(1.001)
        trained.model.embed_tokens.weight.mul_(1.001)
    refused(path, trained, "its weights have other values")
    refused(path, tiny.model("linear-first"), "has 0 patched base models")


def test_a_wrapped_or_moved_copy_of_the_model_is_the_same_model(saved: tuple[Any, Path]) -> None:
    model, path = saved
    other = patch_model(tiny.model("linear-first"))
    other.config._name_or_path, other.config.use_cache = "elsewhere", False
    other.generation_config.max_new_tokens = 3
    got = forward(other, IDS[:, 20:], load_cache(path, other))[0]
    torch.testing.assert_close(got, forward(model, IDS[:, 20:], load_cache(path, model))[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 5, 100, -1, -4000])
def test_a_cut_file_is_refused(size: int, saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:size])
    refused(cut, model, "is damaged, or no safetensors file")


def test_changed_bytes_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    refused(tmp_path / "flipped.safetensors", model, "its tensors are not those that were written")


def _rewritten(path: Path, to: Path, change: Any) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, to, metadata=metadata)
    return to


def test_files_that_are_no_cache_or_from_the_future_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    save_file({"x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", model, "is no cache that save_cache wrote")
    newer = _rewritten(path, tmp_path / "newer", lambda m, t: m.update(format_version="7"))
    refused(newer, model, "has format version 7")
    lacking = _rewritten(path, tmp_path / "lacking", lambda m, t: m.pop("layers"))
    refused(lacking, model, "does not say its layers")

    def drop_layer(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        metadata["layers"] = json.dumps(json.loads(metadata["layers"])[:-1])

    refused(_rewritten(path, tmp_path / "short", drop_layer), model, "holds 3 layers, this model has 4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cache(tmp_path / "nowhere", model)


def test_what_can_not_be_saved_is_refused_and_leaves_no_file(tmp_path: Path, saved: tuple[Any, Path]) -> None:
    model, path = saved
    there = tmp_path / "cache.safetensors"
    there.write_bytes(path.read_bytes())
    other = patch_model(tiny.model("all-linear"))
    for cache, message in (
        (filled(other), "is not this model's recurrent layer"),
        (DynamicCache(), "has 0 layers but the model has 4"),
        (DynamicCache(config=model.config), "is not this model's recurrent layer"),
        ([torch.zeros(1)], "is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            save_cache(cache, there, model)
    assert there.read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="has 0 patched base models"):
        save_cache(filled(model), there, tiny.model())


def test_a_failed_write_keeps_the_file_that_was_there(
    tmp_path: Path, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved
    there = tmp_path / "cache.safetensors"
    there.write_bytes(path.read_bytes())

    def full(tensors: Any, at: Path, metadata: Any) -> None:
        Path(at).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_cache(filled(model), there, model)
    assert there.read_bytes() == path.read_bytes() and [*tmp_path.iterdir()] == [there]
