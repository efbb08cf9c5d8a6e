"""Whether kernels run on the CPU in Triton's interpreter; known without importing triton."""

from __future__ import annotations

import os


def interpreting() -> bool:
    """Whether Triton runs in its interpreter (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
