"""Shell completion of names and paths, and the command `exitkit completion` that sets it up."""

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
"""Each shell, and the file that it reads when it starts."""


def one_of(*choices: str) -> Completer:
    """Complete one of these words, or a list of them separated by commas."""
    return _after_separators(lambda: dict.fromkeys(choices, ""))


def names(kind: str) -> Completer:
    """Complete names of a catalogue ("methods", "backbones", ...), also after a comma or a plus sign.

    Names come from the entry points and summaries from the cached catalogue; no plugin is imported.
    """

    def known() -> Mapping[str, str]:
        from exitkit.cli.catalogue import outline

        return outline(kind)

    return _after_separators(known)


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the folder of a run, in the folder typed so far or in `runs`."""
    typed = Path(incomplete or "runs/")
    folder, start = (typed, "") if incomplete in ("", ".") or incomplete.endswith("/") else (typed.parent, typed.name)
    matches = [path for path in _folders(folder) if path.name.startswith(start)]
    if not matches and not incomplete:
        matches = _folders(Path())
    items = [CompletionItem(str(path)) for path in matches if (path / "recipe.json").is_file()]
    return items or [CompletionItem(incomplete, type="dir")]


def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of an installed recipe, or a file."""
    matches = names("recipes")(context, parameter, incomplete)
    return matches or [CompletionItem(incomplete, type="file")]


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
        cut = max((match.end() for match in re.finditer("[,+]", incomplete)), default=0)
        before, start = incomplete[:cut], incomplete[cut:]
        return [
            CompletionItem(before + name, help=summary or None)
            for name, summary in known().items()
            if name.startswith(start)
        ]

    return complete


@click.command(short_help="Set up tab completion in a shell.")
@click.argument("shell", metavar="[bash|zsh|fish]", required=False, shell_complete=one_of(*SHELLS))
def completion(shell: str | None) -> None:
    """Print the completion script of a shell; without an argument, print how to install it.

    It completes commands, options, and the names of methods, backbones, data sets, recipes and runs.

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
        raise UserError(f"the installed version of click does not support completion in {shell}; upgrade click")
    root = click.get_current_context().find_root().command
    # Not `source()`, which would start bash to check its version; old versions print an error themselves.
    completer = kind(root, {}, "exitkit", COMPLETION)
    click.echo(completer.source_template % completer.source_vars())


def _advice(shells: Iterable[str]) -> str:
    current = Path(os.environ.get("SHELL", "")).name
    selected = [current] if current in shells else list(shells)
    lines = []
    for shell in selected:
        line = f'eval "$(exitkit completion {shell})"'
        if shell == "fish":
            line = f"exitkit completion fish > {SHELLS[shell]}"
            lines.append(f"{shell}: run this command once, then open a new shell:\n  {line}")
        else:
            lines.append(f"{shell}: add this line to {SHELLS[shell]}, then open a new shell:\n  {line}")
    return "\n".join(lines)
