"""Which methods can be had here: some need a package that is not always installed."""

from __future__ import annotations

import click

from exitkit.errors import UserError
from exitkit.plugins import configure


def usable(names: list[str]) -> list[str]:
    """Return the methods that can be had here, and say which can't and why."""
    found = []
    for name in names:
        try:
            configure("method", name, {})
        except UserError as error:
            click.echo(f"left out {name}: {error}", err=True)
        else:
            found.append(name)
    return found
