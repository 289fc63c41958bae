"""Equations as MathML: browsers set them by themselves, without a script, a font or a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def _inline(visitor: Any, node: nodes.Node) -> None:
    visitor.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(visitor: Any, node: nodes.Node) -> None:
    visitor.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer and make it the one in use."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
