"""The installed methods: some methods need an optional package."""

from __future__ import annotations

import click

from exitkit.errors import UserError
from exitkit.escaping import one_line
from exitkit.plugins import configure


def usable(names: list[str]) -> list[str]:
    """Return the methods whose packages are installed; print the names and reasons of the others."""
    available = []
    for name in names:
        try:
            configure("method", name, {})
        except UserError as error:
            click.echo(f"skipped {name}: {one_line(str(error))}", err=True)
        else:
            available.append(name)
    return available
