"""Checkpoints as they lie on disk or in memory: what they hold, and their tensors, one file at a time.

Reads safetensors files and files of `torch.save` (mapped into memory, and with `weights_only=True`: a checkpoint is
data and runs nothing), alone or in shards with an index. No tensor is read before it is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, TORCH = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
INDEX = ".index.json"
# What Transformers calls the weights of a directory; the first that is there is read.
USUAL = ("model.safetensors", "pytorch_model.bin")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ConversionError(ValueError):
    """A checkpoint that can not be converted. The message says what is wrong with it and what was expected."""


@dataclass(frozen=True)
class Stored:
    """A tensor that was not read yet: its shape, dtype (a floating one) and file; None if it is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by key, in the order of its files, and the model options it brings along, if any."""

    name: str
    tensors: dict[str, Stored]
    options: dict[str, Any] | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of `keys`, with each file opened once. Those of files may be views of the mapped file."""
        by_file: dict[Path | None, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.tensors[key].file, []).append(key)
        tensors = {}
        for file, wanted in by_file.items():
            if file is None:
                tensors.update({key: self.memory[key] for key in wanted})
            elif file.suffix in SAFETENSORS:
                with safe_open(file, framework="pt") as opened:
                    tensors.update({key: opened.get_tensor(key) for key in wanted})
            else:
                state, _ = _torch_file(file)
                tensors.update({key: state[key] for key in wanted})
        return tensors


def open_checkpoint(source: str | Path | Mapping[str, Any]) -> Checkpoint:
    """What `source` holds: a file, a directory, or a state dict, of which no tensor is read.

    A directory holds weights by a usual name (`model.safetensors`, `pytorch_model.bin`, or either in shards with its
    index), or a single file of weights. Raises ConversionError if there are none, if files are missing or damaged, or
    if something is not a floating-point tensor.
    """
    if isinstance(source, Mapping):
        state, options = _state_of(source, "the state dict")
        return Checkpoint("the state dict", _described(state, "the state dict", None), options, state)
    path = Path(source)
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise ConversionError(f"{path} does not exist: give a checkpoint's file or directory")
    return _files(str(path), [path])


def _directory(path: Path) -> Checkpoint:
    for name in USUAL:
        if (path / (name + INDEX)).is_file():
            return _shards(path, path / (name + INDEX))
        if (path / name).is_file():
            return _files(str(path), [path / name])
    found = sorted(f for f in path.iterdir() if f.suffix in SAFETENSORS + TORCH and f.is_file())
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ConversionError(
            f"{path} must hold {' or '.join(USUAL)}, one of them in shards with its index, or a single file of "
            f"weights; files of weights found: {names}"
        )
    return _files(str(path), found)


def _shards(path: Path, index: Path) -> Checkpoint:
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ConversionError(f"{index} has no weight_map, which must say in which file each tensor is")
    outside = sorted({str(name) for name in homes.values() if not isinstance(name, str) or Path(name).name != name})
    if outside:
        raise ConversionError(f"{index} names files outside of its directory: {', '.join(outside)}")
    missing = sorted({name for name in homes.values() if not (path / name).is_file()})
    if missing:
        raise ConversionError(f"{path} lacks shards that {index.name} names: {', '.join(missing)}")
    checkpoint = _files(str(path), [path / name for name in dict.fromkeys(homes.values())])
    here = {key: stored.file.name for key, stored in checkpoint.tensors.items() if stored.file is not None}
    astray = sorted(key for key in homes.keys() | here.keys() if homes.get(key) != here.get(key))
    if astray:
        raise ConversionError(f"{index.name} and the shards in {path} disagree about {listed(astray)}")
    return checkpoint


def _files(name: str, files: list[Path]) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    options: dict[str, Any] | None = None
    for file in files:
        if file.suffix in SAFETENSORS:
            found = _safetensors_file(file)
        elif file.suffix in TORCH:
            state, options = _torch_file(file)
            found = _described(state, str(file), file)
        else:
            raise ConversionError(f"{file} must be a file of weights, ending in {', '.join(SAFETENSORS + TORCH)}")
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ConversionError(f"{file} repeats keys of another shard: {listed(twice)}")
        tensors.update(found)
    return Checkpoint(name, tensors, options)


def _safetensors_file(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.offset_keys()}
            kinds = {key: piece.get_dtype() for key, piece in slices.items()}
            odd = sorted(f"{key} ({kind})" for key, kind in kinds.items() if kind not in FLOATS)
            if odd:
                raise ConversionError(f"{file} must hold floating-point tensors of 16 bits or more, not {listed(odd)}")
            return {key: Stored(tuple(s.get_shape()), FLOATS[kinds[key]], file) for key, s in slices.items()}
    except SafetensorError as error:
        raise ConversionError(f"{file} is damaged or not a safetensors file: {error}") from error


def _torch_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    # A Namespace is what fairseq keeps options in; it is a bag of attributes. Only zip files can be mapped into memory.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} is damaged, or holds more than tensors and plain options, which is not loaded because it could "
            "run code: save its state dict alone with torch.save(model.state_dict(), ...)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        first = str(error).partition("\n")[0]
        raise ConversionError(f"{file} is damaged or not a file of torch.save: {first}") from error
    return _state_of(loaded, str(file))


def _state_of(loaded: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict, and the options of its model where it is a checkpoint of fairseq, which keeps both."""
    options = None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        cfg, args = loaded.get("cfg"), loaded.get("args")
        if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping | argparse.Namespace):
            options = cfg["model"]
        elif isinstance(args, argparse.Namespace):
            options = args
        options = dict(vars(options)) if isinstance(options, argparse.Namespace) else options and dict(options)
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(f"{name} must hold a state dict, not a {type(loaded).__name__} or nothing")
    odd = sorted(f"{key} ({type(value).__name__})" for key, value in loaded.items() if not isinstance(value, Tensor))
    if odd:
        raise ConversionError(f"{name} must hold tensors only, not {listed(odd)}")
    return dict(loaded), options


def _described(state: Mapping[str, Tensor], name: str, file: Path | None) -> dict[str, Stored]:
    odd = sorted(f"{key} ({t.dtype})" for key, t in state.items() if t.dtype not in FLOATS.values() or t.is_sparse)
    if odd:
        raise ConversionError(f"{name} must hold dense floating-point tensors of 16 bits or more, not {listed(odd)}")
    return {key: Stored(tuple(t.shape), t.dtype, file) for key, t in state.items()}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConversionError if it is not there, damaged, or not an object."""
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} can not be read as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{file} must hold a JSON object, not a {type(loaded).__name__}")
    return loaded


def listed(names: list[str], most: int = 12) -> str:
    """Names for a message: all of them, or the first and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
