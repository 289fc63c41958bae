"""Render equations as MathML, which browsers display without a script, a font or a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

_LOG = logging.getLogger(__name__)


def _mathml(node: nodes.Node, display: str) -> str:
    """Return an equation, and warn if it has an unknown command, which would be shown as text."""
    markup: str = convert(node.astext(), display=display)
    if "\\" in markup:
        _LOG.warning("unknown command in equation: %s", node.astext(), location=node)
    return markup


def _inline(visitor: Any, node: nodes.Node) -> None:
    visitor.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(visitor: Any, node: nodes.Node) -> None:
    visitor.body.append(f'<div class="equation">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer and select it."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
