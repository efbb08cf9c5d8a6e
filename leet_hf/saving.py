"""Saving a cache to a file and resuming from it: safetensors, written atomically, refused by any other model."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache import RecurrentLayer
from .fingerprint import fingerprint
from .generation import patched_base
from .shapes import CacheSpec, RecurrentShape
from .static_cache import StaticRecurrentLayer
from .upgrade import layers_counted, new_cache, upgrade

FORMAT, VERSION = "leet_hf.cache", 1
_SAID = {
    "config": "its config says other things about layers, sizes or decays",
    "shapes": "its weights have other names, shapes or dtypes",
    "weights": "its weights have other values (another checkpoint, or trained or merged since)",
}


def save_cache(cache: Any, path: str | os.PathLike[str], model: torch.nn.Module) -> Path:
    """Write a cache of a patched model to a file, from which `load_cache` makes one that goes on the same way.

    Everything decoding needs is kept: states (float32), the tokens that can still be taken back, keys and values of
    softmax layers. The file is complete or not there at all, whatever happens meanwhile.

    Args:
        cache: a DynamicCache or StaticCache that this model has filled; it is left as it is.
        path: of the file; one that is there is replaced. Its folder must exist.
        model: the patched model (or one of `leet_hf`'s own), whose fingerprint goes into the file.

    Returns:
        The path.

    Raises:
        ValueError: the model is not patched; the cache is of another model, holds no recurrent layers, or has layers
            that can not be saved (sliding windows, quantized ones).
    """
    base, host = patched_base(model)
    tensors, layers = _taken_apart(cache, host.spec)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "kind": "static" if _is_static(cache) else "dynamic",
        "layers": json.dumps(layers),
        "fingerprint": json.dumps(fingerprint(base)),
        "model": type(base).__name__,
        "checksum": _checksum(tensors),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_cache(path: str | os.PathLike[str], model: torch.nn.Module) -> Cache:
    """The cache that `save_cache` wrote, on the devices of the model's layers.

    Args:
        path: of the file.
        model: the model it was saved with, patched: the same config, and the same weights in the same dtype.

    Returns:
        A DynamicCache or StaticCache, as it was saved, with as many rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is none of `save_cache`, is of a newer format, or is of another model.
    """
    base, host = patched_base(model)
    path = Path(path)
    metadata, tensors = _read(path)
    _check_model(path, base, json.loads(metadata["fingerprint"]), metadata["model"])
    if _checksum(tensors) != metadata["checksum"]:
        _refuse(path, "is damaged: its tensors are not those that were written")
    layers = json.loads(metadata["layers"])
    _check_layers(path, layers, tensors, host.spec)
    if metadata["kind"] == "static":
        length = next((layer["max_cache_len"] for layer in layers if layer.get("max_cache_len") is not None), 1)
        with layers_counted(base.config, len(host.spec)):
            cache: Cache = StaticCache(config=base.config, max_cache_len=length)
    else:
        cache = new_cache(base.config)
    upgrade(cache, host.spec)
    for index, (_, attention) in enumerate(host.adapter.attentions(base)):
        _fill(cache.layers[index], layers[index], _of_layer(tensors, index), _device(attention))
    return cache


def _is_static(cache: Any) -> bool:
    return any(isinstance(layer, StaticLayer | StaticRecurrentLayer) for layer in cache.layers)


# Taking a cache apart.


def _taken_apart(cache: Any, spec: CacheSpec) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors by name, and per layer what else there is to know of it."""
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, DynamicCache | StaticCache) or layers is None:
        raise ValueError(f"cache is a {type(cache).__name__}, must be a DynamicCache or StaticCache")
    if len(layers) != len(spec):
        raise ValueError(f"cache has {len(layers)} layers but the model has {len(spec)}: save a cache it has filled")
    tensors: dict[str, Tensor] = {}
    described = []
    for index, (layer, shape) in enumerate(zip(layers, spec, strict=True)):
        if isinstance(shape, RecurrentShape):
            if not isinstance(layer, RecurrentLayer) or layer.spec != spec:
                raise ValueError(
                    f"cache has a {type(layer).__name__} at layer {index} that is not this model's recurrent layer: "
                    "save a cache that this model has filled"
                )
            own, about = _recurrent(layer)
        else:
            own, about = _softmax(layer, index)
        tensors |= {f"{index}.{name}": tensor.detach().contiguous().cpu() for name, tensor in own.items()}
        described.append(about)
    return tensors, described


def _recurrent(layer: RecurrentLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about: dict[str, Any] = {"kind": "recurrent", "length": int(layer.get_seq_length())}
    about["max_cache_len"] = getattr(layer, "max_cache_len", None)
    state = layer.state
    if state is None or not layer.has_tokens:
        return {}, about | {"length": 0}
    about |= {"recording": layer.record_past, "window": layer.window, "grows": layer.grows}
    about |= {"buffer": state.buffer, "keep": state.keep}
    start, held, _ = state.cursor.tolist()
    slots = (start + torch.arange(held, device=state.base.device)) % state.keys.shape[1]
    rings = {"keys": state.keys, "values": state.values, "log_decays": state.log_decays}
    return {"base": state.base.clone()} | {name: ring.index_select(1, slots) for name, ring in rings.items()}, about


def _softmax(layer: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    kind = _softmax_kind(layer)
    if kind is None:
        raise ValueError(
            f"cache has a {type(layer).__name__} at layer {index}, which can not be saved: use the layers of a plain "
            "DynamicCache or StaticCache"
        )
    length = int(layer.get_seq_length())
    about = {"kind": kind, "length": length, "max_cache_len": getattr(layer, "max_cache_len", None)}
    if not layer.is_initialized or length == 0:
        return {}, about
    # clones: views of one storage would be refused, or written whole
    return {"keys": layer.keys[:, :, :length].clone(), "values": layer.values[:, :, :length].clone()}, about


def _softmax_kind(layer: Any) -> str | None:
    if type(layer) is StaticLayer:
        return "static"
    # Subclasses of DynamicLayer hold less than every token, or hold it in another form, unless they say otherwise.
    return "dynamic" if type(layer) is DynamicLayer or getattr(layer, "holds_every_token", False) else None


# Putting it together again.


def _fill(layer: Any, about: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    if not tensors:
        return
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    if isinstance(layer, RecurrentLayer):
        layer.restore(
            tensors["base"], tensors["keys"], tensors["values"], tensors["log_decays"], about["length"],
            buffer=about["buffer"], keep=about["keep"],
        )  # fmt: skip
        layer.record_past, layer.window, layer.grows = about["recording"], about["window"], about["grows"]
    else:
        layer.update(tensors["keys"], tensors["values"])


def _device(attention: torch.nn.Module) -> torch.device:
    """Where a layer computes."""
    held = [p.device for p in attention.parameters() if p.device.type != "meta"]
    hooks = [getattr(module, "_hf_hook", None) for module in attention.modules()]  # of accelerate, where offloaded
    execution = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return torch.device([*execution, *held, "cpu"][0])


# Reading and refusing.


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"path is {path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                _refuse(path, "is no cache that save_cache wrote")
            if int(metadata["format_version"]) > VERSION:
                found = metadata["format_version"]
                _refuse(path, f"has format version {found}, this leet_hf reads up to {VERSION}: use a newer one")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a handle, not a dict
    except SafetensorError as error:
        _refuse(path, f"is damaged, or no safetensors file ({error})")
    needed = {"kind", "layers", "fingerprint", "model", "checksum"}
    if not needed <= metadata.keys():
        _refuse(path, f"is damaged: it does not say its {', '.join(sorted(needed - metadata.keys()))}")
    return metadata, tensors


def _check_model(path: Path, base: Any, saved: dict[str, str], name: str) -> None:
    own = fingerprint(base)
    for part, words in _SAID.items():
        if saved.get(part) != own[part]:
            _refuse(path, f"is of another model, a {name}: {words}, compared with this {type(base).__name__}")


def _check_layers(path: Path, layers: list[dict[str, Any]], tensors: dict[str, Tensor], spec: CacheSpec) -> None:
    if len(layers) != len(spec):
        _refuse(path, f"holds {len(layers)} layers, this model has {len(spec)}")
    for index, (about, shape) in enumerate(zip(layers, spec, strict=True)):
        own = _of_layer(tensors, index)
        wanted = {"base", "keys", "values", "log_decays"} if isinstance(shape, RecurrentShape) else {"keys", "values"}
        if own.keys() != (wanted if about["length"] else set()):
            _refuse(path, f"is damaged: layer {index} has {sorted(own)}, must have {sorted(wanted)}")
        if own and isinstance(shape, RecurrentShape):
            held = (shape.heads, shape.key_dim, shape.value_dim)
            if own["base"].shape[1:] != held:
                _refuse(
                    path, f"holds a state of {list(own['base'].shape)} at layer {index}, not [B, H, K, V] of {shape}"
                )


def _of_layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"{index}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"path is {path}, which {reason}")
