"""A model directory that appears whole or not at all, and its weights in safetensors shards."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import INDEX, ConversionError, Stored

WEIGHTS = "model.safetensors"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def check_target(target: Path, force: bool) -> None:
    """Raises ConversionError unless a directory may be written at `target`: nothing, an empty directory, or `force`."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConversionError(f"target {target} is not a directory: give a new one")
    if not target.parent.is_dir():
        raise ConversionError(f"target {target} can not be written: {target.parent} is not a directory, make it first")
    held = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if held and not force:
        names = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "")
        raise ConversionError(
            f"target {target} is not empty ({names}): give a new one, or say force (--force) to replace all of it"
        )


def unfinished(target: Path) -> list[Path]:
    """Hidden directories beside `target` that conversions to it left, because they were killed or are still running."""
    return sorted(target.parent.glob(f".{_escaped(target.name)}.*.partial"))


@contextmanager
def whole_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `target` when the block ends without an exception.

    Until then it is a hidden sibling, and `target` stays as it was, whatever happens: an exception removes the sibling,
    a kill leaves it. With `force`, an old directory and the new one change places in one step where the system can.
    """
    check_target(target, force)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield work
        _open_to_others(work)
        check_target(target, force)  # again: much time has passed
        if target.is_dir() and any(target.iterdir()):
            _replace(work, target)
        else:
            os.rename(work, target)  # over an empty directory, too; fails if it is filled meanwhile
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after an exchange, this is the old directory


def _replace(work: Path, target: Path) -> None:
    if _exchange(work, target):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, old)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step, by Linux's renameat2(2). Returns whether that could be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _open_to_others(work: Path) -> None:
    """Temporary directories and safetensors files are for their owner alone: give them the user's usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    for file in work.iterdir():
        file.chmod(0o666 & ~mask)


def write_weights(
    folder: Path,
    names: Mapping[str, str],
    tensors: Mapping[str, Stored],
    read: Callable[[list[str]], Mapping[str, Tensor]],
    max_shard_size: int,
) -> int:
    """Write the tensors of a checkpoint under new names into shards of at most `max_shard_size` bytes, one in memory.

    `names` says for each new name which key of `tensors` it is; `read` reads keys. A tensor larger than a shard is a
    shard alone. Returns the number of shards; several have an index, as Transformers writes and reads them.
    """
    shards: list[list[str]] = []
    size = 0
    order = {key: place for place, key in enumerate(tensors)}  # so that each source file is read in one go
    for name in sorted(names, key=lambda name: order[names[name]]):
        nbytes = tensors[names[name]].nbytes
        if not shards or size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    stem, suffix = os.path.splitext(WEIGHTS)
    files = [f"{stem}-{i + 1:05}-of-{len(shards):05}{suffix}" for i in range(len(shards))]
    if len(shards) == 1:
        files = [WEIGHTS]
    for file, shard in zip(files, shards, strict=True):
        state = read([names[name] for name in shard])
        # A copy, for a file holds each tensor once, and two keys of a checkpoint may share memory.
        save_file({n: state[names[n]].detach().contiguous().clone() for n in shard}, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensors[key].nbytes for key in names.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in sorted(shard)},
        }
        (folder / (WEIGHTS + INDEX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def size_in_bytes(size: int | str) -> int:
    """`size` in bytes: a number, or a text such as "5GB", "200MB" or "1GiB". Raises ConversionError for others."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in UNITS or (total := int(float(match[1]) * UNITS[match[2].upper()])) < 1:
        raise ConversionError(f"max_shard_size is {size!r}, must be a size above 0 such as 5GB, 200MB or 1GiB")
    return total


def _escaped(name: str) -> str:
    """`name` as a pattern of glob that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
