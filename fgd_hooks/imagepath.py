"""What one probe tells about tokens and channels-last maps: where their images come in, and how they become maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fgd_hooks.layouts import LayoutError, Size, infer_layout
from fgd_hooks.tapnames import Tap


class ImagePath:
    """Which modules an image batch goes into, and what layout the features behind them have.

    Args:
        model: the model that is probed.
        canvas: (h, w) in pixels of the images that it is probed with.
    """

    def __init__(self, model: nn.Module, canvas: Size) -> None:
        self.model = model
        self.canvas = canvas
        self.modules: list[str] = []

    def see(self, tap: Tap, value: Any) -> None:
        """Take note of a module whose input has the size of the canvas."""
        if tap.io == "input" and isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == self.canvas:
            self.modules.append(tap.module)

    def prefix(self, module: str) -> int | None:
        """What the innermost model around a module says about its tokens without a place (timm's do)."""
        for name in _around(module):
            number = getattr(self.model.get_submodule(name), "num_prefix_tokens", None)
            if isinstance(number, int):
                return number
        return None

    def source(self, module: str) -> str:
        """The module that the images go into on their way to another: the last one in the closest part around both.

        That is the patch embedding as a rule. It runs whatever method of the model is called (``forward_features``).
        """
        for part in _around(module):
            inside = [name for name in self.modules if not part or name == part or name.startswith(f"{part}.")]
            if inside:
                return inside[-1]
        return ""

    def with_layout(self, tap: Tap, value: Any) -> Tap:
        """The tap with the layout of what it saw.

        Raises:
            LayoutError: the layout cannot be told.
        """
        layout = tap.layout
        if layout is None:
            known = self.prefix(tap.module)
            try:
                layout = infer_layout(value, self.canvas, known)
            except LayoutError:
                if not known:
                    raise
                layout = infer_layout(value, self.canvas, 0)  # before the class token is put in front
        if layout is not None and layout.cell is not None:
            layout = replace(layout, images=self.source(tap.module))
        return replace(tap, layout=layout)


def _around(module: str) -> Iterator[str]:
    """A module's name, then those of the modules around it, the whole model (empty) last."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
