"""Block shapes by head widths and dtype: a table, so that nothing is measured at run time.

A configuration depends on the widths and the dtype only, never on batch, length or heads: another shape never compiles
again. On devices with less shared memory than the table was made for (H100, 227 KiB a block) the stages, then the
blocks, shrink until the tiles fit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class SweepConfig(NamedTuple):
    """chunk: tokens a step; block_x, block_y: tile of the state a program holds; warps, stages: launch options."""

    chunk: int
    block_x: int
    block_y: int
    warps: int
    stages: int


# Chunks divide this, and so do the lengths of segments.
LONGEST_CHUNK = 64
# Wider rows take several programs, each of which gives a part of every output.
_WIDEST_BLOCK = 256
# (state rows, 16-bit inputs?) -> configuration. float32 products become scalar code: small tiles compile sooner.
_SWEEP = {
    (16, True): SweepConfig(64, 16, 64, 4, 3),
    (32, True): SweepConfig(64, 32, 64, 4, 3),
    (64, True): SweepConfig(64, 64, 64, 4, 3),
    (128, True): SweepConfig(64, 128, 64, 4, 3),
    (256, True): SweepConfig(64, 256, 64, 8, 2),
    (16, False): SweepConfig(32, 16, 32, 4, 2),
    (32, False): SweepConfig(32, 32, 32, 4, 2),
    (64, False): SweepConfig(16, 64, 32, 4, 2),
    (128, False): SweepConfig(16, 128, 32, 4, 2),
    (256, False): SweepConfig(16, 256, 32, 8, 1),
}
# For the same tiles of the state where they have 256 rows (see ``wide``). With fewer than three stages no load is on
# its way during the products; the state and its 16-bit copy take all registers of four warps.
_WIDE = SweepConfig(32, _WIDEST_BLOCK, 64, 4, 3)
# Shared memory of the device that was chosen for.
_WIDE_BYTES = 227 * 1024


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``; triton.cdiv takes a microsecond on the host."""
    return -(-count // size)


def block_of(width: int) -> int:
    """Smallest power of two that holds ``width``, at least 16 (what the matrix units take)."""
    return max(16, 1 << (width - 1).bit_length())


@functools.cache
def shared_memory(device_index: int) -> int:
    """Bytes of shared memory one block may use on a CUDA device."""
    properties = torch.cuda.get_device_properties(device_index)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


@functools.cache
def processors(device_index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


@functools.cache
def sweep_config(x: int, y: int, dtype: torch.dtype, decay: int, device_index: int) -> SweepConfig:
    """Configuration of a sweep whose state is [x, y]. ``device_index`` -1 stands for Triton's interpreter.

    decay: 0 none, 1 per head, 2 per token.
    """
    itemsize = dtype.itemsize
    config = _SWEEP[(min(block_of(x), _WIDEST_BLOCK), itemsize == 2)]
    if decay == 2 or (dtype == torch.float16 and config.block_x == 128):
        # Sums and exponentials of every chunk, or the largest entry of a state in float16, keep a program waiting: two
        # on a processor fill each other's gaps.
        config = config._replace(stages=min(config.stages, 2))
    # Narrower than 64 columns of 16-bit data, Triton 3.6 can read past its shared memory: a memory checker found it.
    config = config._replace(block_y=min(config.block_y, max(block_of(y), 64 if itemsize == 2 else 16)))
    if device_index < 0:
        return config
    limit = shared_memory(device_index)
    while _sweep_bytes(config, itemsize) > limit:
        if config.stages > 1:
            config = config._replace(stages=config.stages - 1)
        elif config.block_y > 16:
            config = config._replace(block_y=config.block_y // 2)
        elif config.chunk > 16:
            config = config._replace(chunk=config.chunk // 2)
        else:
            break
    return config


def wide_config(x: int, dtype: torch.dtype, decay: int, device_index: int) -> SweepConfig | None:
    """Configuration of ``wide_kernel`` for a sweep with ``x`` rows of the state; None where ``sweep_kernel`` serves."""
    if dtype != torch.bfloat16 or decay == 2 or block_of(x) < _WIDEST_BLOCK:
        return None
    return _WIDE if device_index < 0 or shared_memory(device_index) >= _WIDE_BYTES else None


def with_terms(config: SweepConfig) -> SweepConfig:
    """The configuration of a pass that also gives the terms of the gradient of log_decay: twice the tiles at once."""
    return config._replace(warps=8, stages=1 if config.block_x > 128 else min(config.stages, 2))


def without_outputs(config: SweepConfig, itemsize: int, device_index: int) -> SweepConfig:
    """The configuration of a pass that only gathers states: a third of the tiles, so more of them on their way."""
    if device_index < 0:
        return config
    tiles = config.chunk * (config.block_x + config.block_y) * itemsize
    operands = config.block_x * config.block_y * itemsize
    return config._replace(stages=max(config.stages, min(4, (shared_memory(device_index) - operands) // tiles)))


def _sweep_bytes(config: SweepConfig, itemsize: int) -> int:
    """Estimate of the shared memory of a sweep: the staged tiles, and the state and products on their way to a dot."""
    tiles = config.chunk * (2 * config.block_x + config.block_y) * itemsize * config.stages
    operands = config.block_x * config.block_y * itemsize + config.chunk * config.chunk * itemsize
    return tiles + operands


def segments(tokens: int, config: SweepConfig, programs: int, device_index: int) -> tuple[int, int]:
    """(number of segments, tokens in one) for sequences of ``tokens`` when one segment gives ``programs`` programs.

    Segments cost a second reading of keys and values, so they are cut only where the device would stand idle: a
    program on every processor is enough to keep the memory busy. Two do not pay where a pass waits for the memory, as
    they read as much again as they gain; the widest rows wait for products, which the first reading has one of.
    """
    least = 4 * config.chunk
    if device_index < 0:
        wanted = 2 if tokens > least else 1
    else:
        wanted = processors(device_index) // max(programs, 1)
        least *= 2  # the pass that gathers states, and two launches more, take as long as so many chunks
    count = max(1, min(wanted, tokens // least))
    if count < (3 if config.block_x < _WIDEST_BLOCK else 2) and device_index >= 0:
        count = 1
    length = -(-tokens // count)
    length = max(1, -(-length // LONGEST_CHUNK)) * LONGEST_CHUNK
    return max(1, -(-tokens // length)), length


# Buffered tokens, padded, that one product folds; for more a program has no registers.
MOST_AT_ONCE = 32


class StepConfig(NamedTuple):
    """rows, held: tokens of the step and of the buffer, padded; block_v: columns of the state in a tile; warps,
    registers a thread: launch options; tiles: the most that one program takes, one after another."""

    rows: int
    held: int
    block_v: int
    warps: int
    registers: int | None
    tiles: int


@functools.cache
def step_config(
    key_dim: int, value_dim: int, tokens: int, buffer: int, itemsize: int, device_index: int
) -> StepConfig | None:
    """Configuration of a decode step of ``tokens`` into a buffer; None where another method has to serve.

    That is where no block's shared memory holds it. ``device_index`` -1 stands for Triton's interpreter.
    """
    width, held = block_of(key_dim), block_of(buffer)
    rows = 1 if tokens == 1 else block_of(tokens)
    if rows == 1:
        # Two tiles, the one that is worked on and the next, in 64 registers a thread.
        columns = 32 if width <= 256 else 16
        forms = [StepConfig(rows, held, min(columns, block_of(value_dim)), max(2, min(8, width // 32)), 128, 4)]
    elif rows >= 64 and itemsize == 2:
        # Here Triton takes Hopper's wide products, whose tiles must not be narrow (see `sweep_config`).
        forms = [StepConfig(rows, held, 64, 8, None, 2)]
    elif itemsize == 2:
        # All tiles of a head, as far as that goes: the scores are worked out once for them.
        warps = {128: 4, 256: 4, 512: 8}.get(width, 2)
        registers = 128 if width <= 128 and rows == 16 else None
        forms = [StepConfig(rows, held, columns, warps, registers, 16) for columns in (32, 16)]
    elif held <= 128 and rows * held <= 4096:
        forms = [StepConfig(rows, held, 32, 8 if rows >= 64 or width > 128 else 4, 255, 4)]
    else:
        forms = []  # products in float32 are scalar code, which would take half a minute to compile
    for form in forms:
        if device_index < 0 or step_bytes(form, width, itemsize) <= shared_memory(device_index):
            return form
    return None


def step_bytes(form: StepConfig, width: int, itemsize: int) -> int:
    """Estimate from above of the shared memory of a decode step: the most that one of its products needs."""
    rows, held, columns = form.rows, form.held, form.block_v
    together = held if held <= MOST_AT_ONCE else 16
    fold = width * columns * 4 + ((rows + together) * width + 3 * together * columns) * itemsize
    if rows == 1:
        return fold + 4096
    scores = ((2 * rows + held) * width + rows * (rows + held)) * itemsize
    tile = (width * columns + (rows + held) * columns + 2 * rows * width + rows * (rows + held)) * itemsize
    return max(scores, tile, fold) + 4096


def step_tiles(form: StepConfig, tiles: int, heads: int, device_index: int) -> int:
    """How many of a head's tiles a program takes where ``heads`` of them step: fewer where the device would idle."""
    together = min(form.tiles, tiles)
    while together > 1 and device_index >= 0 and heads * blocks(tiles, together) < 3 * processors(device_index):
        together = (together + 1) // 2
    return together
