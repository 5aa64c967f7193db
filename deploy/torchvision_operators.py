"""Declares two operators of torchvision just before it is imported, in every process of an environment.

torchvision's general wheel is built for CUDA. With a CPU build of torch its operators do not load, and its import fails
at the first operator it refers to. Declaring their names and types is enough, because nothing calls them.
deploy/setup-captioner.sh installs this file, and a .pth file that imports it, only where the import fails: declaring an
operator twice is an error. torch is not imported before it is needed, because this runs at the start of every Python.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for name in ("nms", "qnms"):
                    torch.library.define(
                        f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )


sys.meta_path.insert(0, _BeforeTorchvision())
