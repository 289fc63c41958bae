"""Shell completion: what the shell asks while a line is typed, and `exitkit completion` that sets it up."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from exitkit.cli import COMPLETION
from exitkit.errors import UserError, unknown

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/exitkit.fish"}
"""Each shell, and the file that it reads at its start."""


def one_of(*choices: str) -> Completer:
    """Complete one of these words, or a list of them with commas."""
    return _after_separators(lambda: dict.fromkeys(choices, ""))


def names(kind: str) -> Completer:
    """Complete names of a catalogue ("methods", "backbones", ...), also behind a comma or a plus.

    What is installed is known from the entry points, what it is from the remembered catalogue: no plugin is imported.
    """

    def known() -> Mapping[str, str]:
        from exitkit.cli.catalogue import outline

        return outline(kind)

    return _after_separators(known)


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the folder of a run: those in the folder begun, or in `runs`."""
    here = Path(incomplete or "runs/")
    folder, start = (here, "") if incomplete in ("", ".") or incomplete.endswith("/") else (here.parent, here.name)
    found = [path for path in _folders(folder) if path.name.startswith(start)]
    if not found and not incomplete:
        found = _folders(Path())
    ends = [CompletionItem(str(path)) for path in found if (path / "recipe.json").is_file()]
    return ends or [CompletionItem(incomplete, type="dir")]


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a shipped recipe, or a file."""
    found = names("recipes")(context, parameter, incomplete)
    return found or [CompletionItem(incomplete, type="file")]


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a folder."""
    return [CompletionItem(incomplete, type="dir")]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _after_separators(known: Callable[[], Mapping[str, str]]) -> Completer:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        cut = max((found.end() for found in re.finditer("[,+]", incomplete)), default=0)
        before, start = incomplete[:cut], incomplete[cut:]
        return [
            CompletionItem(before + name, help=summary or None)
            for name, summary in known().items()
            if name.startswith(start)
        ]

    return complete


@click.command(short_help="Set up the completion of names with the tab key.")
@click.argument("shell", metavar="[bash|zsh|fish]", required=False, shell_complete=one_of(*SHELLS))
def completion(shell: str | None) -> None:
    """Print the script that completes commands, options and names in your shell; without a shell, how to use it.

    Methods, backbones, data sets, recipes and runs are completed too.

    \b
    Examples:
      exitkit completion
      exitkit completion bash >> ~/.bashrc
      exitkit completion fish > ~/.config/fish/completions/exitkit.fish
    """
    if shell is None:
        click.echo(_advice(SHELLS))
        return
    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    kind = get_completion_class(shell)
    if kind is None:
        raise UserError(f"this version of click completes nothing in {shell}")
    root = click.get_current_context().find_root().command
    # What `source()` also does is to start bash and look at its version: old ones say so themselves.
    made = kind(root, {}, "exitkit", COMPLETION)
    click.echo(made.source_template % made.source_vars())


def _advice(shells: Iterable[str]) -> str:
    mine = Path(os.environ.get("SHELL", "")).name
    chosen = [mine] if mine in shells else list(shells)
    lines = []
    for shell in chosen:
        line = f'eval "$(exitkit completion {shell})"'
        if shell == "fish":
            line = f"exitkit completion fish > {SHELLS[shell]}"
            lines.append(f"{shell}: run this once, and open a new shell:\n  {line}")
        else:
            lines.append(f"{shell}: add this line to {SHELLS[shell]}, and open a new shell:\n  {line}")
    return "\n".join(lines)
