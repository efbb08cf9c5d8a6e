"""What patching did, or would do, to a model: per layer and per base model, printable."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One attention layer: its module path and place, and what was done with it.

    status: "patched", "not patched" (a recognised layer of a model that is not patched) or "left alone"; reason: why,
    where it is not patched. adapter, decay (where its decays come from) and method are "" for one that is left alone.
    """

    name: str
    index: int
    adapter: str
    decay: str
    method: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class PatchReport:
    """The result of `patch_report`: `.layers`, and `.host`, one line per base model or generating model."""

    layers: tuple[LayerReport, ...]
    host: tuple[str, ...]

    @property
    def patched(self) -> int:
        """How many layers are patched."""
        return sum(layer.status == "patched" for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "adapter", "decay", "method", "status")]
        for layer in self.layers:
            status = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
            rows.append((layer.name, layer.adapter or "-", layer.decay or "-", layer.method or "-", status))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.patched} of {len(self.layers)} attention layers patched", *self.host, *table])
