"""Starts a ComfyUI: `python comfyui_main.py <ComfyUI folder>/main.py [its arguments]`.

A torchvision that is built for CUDA cannot be imported on a CPU build of torch, because its compiled operators
are missing. They are declared here, without an implementation: nothing that the pack or ComfyUI does at the start
calls them.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # operators vanish with the library that declared them


def declare_missing_operators() -> None:
    """Make `import torchvision` work where its compiled extension does not load."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        _declared.append(library)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    declare_missing_operators()
    runpy.run_path(sys.argv[0], run_name="__main__")
