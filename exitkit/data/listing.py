"""Listing of image folders: their parts, classes and images, and what is passed over.

Each file counts once: links to files and folders that are counted already, loops of links, and further names of a file
(hard links) are passed over.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.escaping import counted

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif", ".avif", ".jp2", ".j2k", ".tga",
)  # fmt: skip
"""Endings of the names of images."""

_ROLES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
_LOOKALIKE = re.compile(
    r"(?:train|training|test|testing|val|valid|validation|dev|eval|evaluation|holdout)"
    r"(?:[ ._-]*(?:set|data|images?|imgs?|part|split|\d+))*",
    re.IGNORECASE,
)
_FOREIGN = ("__MACOSX", "@eaDir")  # folders of macOS archives and of network drives, with no images of the user's

_isjunction = getattr(os.path, "isjunction", lambda path: False)  # links of Windows; since Python 3.12

_Key = tuple[int, int]
"""Device and number of a file or folder, which all of its names share."""


@dataclass
class PassedOver:
    """What a listing passed over.

    Attributes:
        suffixes: number of files of other formats, by suffix.
        hidden: number of files and folders whose name begins with a dot.
        beside: names of files beside the class folders.
        links: number of links, and of further names of a file, that lead to what is counted already.
        folders: names of folders beside the parts that are not used.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    others: int = 0
    hidden: int = 0
    beside: list[str] = field(default_factory=list)
    links: int = 0
    folders: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return one text per reason; empty if nothing was passed over."""
        texts = []
        if self.suffixes:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self.suffixes.most_common(6))
            texts.append(f"{counted(self.suffixes.total(), 'file')} of other formats ({kinds})")
        if self.others:
            texts.append(counted(self.others, "pipe or device", "pipes or devices"))
        if self.hidden:
            texts.append(counted(self.hidden, "hidden entry", "hidden entries"))
        if self.beside:
            texts.append(f"{counted(len(self.beside), 'file')} beside the class folders ({_some(self.beside)})")
        if self.links:
            texts.append(f"{counted(self.links, 'link')} or second names of what is counted already")
        if self.folders:
            texts.append(f"folder{'s' * (len(self.folders) > 1)} {_some(self.folders)}")
        return texts


@dataclass(frozen=True)
class Listing:
    """The images of one part.

    Attributes:
        names: class names, sorted.
        paths: the files, sorted within each class.
        labels: int64 [N], the class of each file.
    """

    names: list[str]
    paths: list[str]
    labels: Tensor


def find_parts(folder: Path) -> dict[str, Path]:
    """Return {"train", "test" or "val": subfolder}, or {} if the subfolders are classes.

    Upper and lower case, and the names training, testing, valid and validation, mean the same.

    Raises:
        UserError: two subfolders are the same part, or a subfolder looks like a part, but is not named as one.
    """
    children = [path.name for path in _subfolders(folder)]
    parts: dict[str, Path] = {}
    for role, names in _ROLES.items():
        matches = [name for name in children if name.lower() in names]
        if len(matches) > 1:
            raise UserError(f"{folder} has {' and '.join(matches)}, which are the same part; expected one of them")
        if matches:
            parts[role] = folder / matches[0]
    alike = [name for name in children if _LOOKALIKE.fullmatch(name) and folder / name not in parts.values()]
    complete = "train" in parts and len(parts) > 1
    if alike and not complete:
        verb = "looks like a part" if len(alike) == 1 else "look like parts"
        raise UserError(f"{folder} has {_some(alike)}, which {verb}; name the parts train, val and test")
    return parts


def list_parts(folder: Path, parts: Sequence[Path]) -> tuple[list[Listing], PassedOver]:
    """List the images of some parts of a folder; each subfolder of a part is a class, with images at any depth.

    Args:
        folder: the folder of the data set.
        parts: subfolders of it, or the folder itself. A file that several parts have counts for the first one in which
            it is no link.

    Raises:
        UserError: a part has fewer than two class folders, a class has no images, or a folder can't be read.
    """
    walk = _Walk()
    if parts[0] != folder:
        used = {part.name for part in parts}
        walk.passed_over.folders = [path.name for path in _subfolders(folder) if path.name not in used]
        walk.look_beside(folder)
    classes = {part: _class_folders(part) for part in parts}
    found: dict[Path, list[str]] = {child: [] for children in classes.values() for child in children}
    for part in parts:
        walk.look_beside(part)
        for child in classes[part]:
            if part.is_symlink() or child.is_symlink():
                walk.links.append((str(child), found[child]))
            else:
                walk.enter(str(child), found[child])
    walk.follow_links()
    listings = []
    for part in parts:
        for child in classes[part]:
            if not found[child]:
                raise UserError(_no_images(child, walk.passed_over))
        paths = [sorted(found[child]) for child in classes[part]]
        sizes = torch.tensor([len(some) for some in paths])
        labels = torch.repeat_interleave(torch.arange(len(paths)), sizes)
        listings.append(Listing([child.name for child in classes[part]], [p for some in paths for p in some], labels))
    return listings, walk.passed_over


class _Walk:
    """Walks through folders: first through all real ones, then through links, so that real names come first."""

    def __init__(self) -> None:
        self.passed_over = PassedOver()
        self.links: list[tuple[str, list[str]]] = []  # each with the list that takes its images
        self._folders: set[_Key] = set()
        self._files: dict[_Key, str] = {}

    def look_beside(self, folder: Path) -> None:
        """Note the files of a folder whose subfolders are read."""
        about = _stat(str(folder))
        self._folders.add((about.st_dev, about.st_ino))
        with _scan(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _FOREIGN:
                    self.passed_over.hidden += 1
                elif not entry.is_dir():
                    self.passed_over.beside.append(entry.name)
        self.passed_over.beside.sort()

    def enter(self, folder: str, found: list[str]) -> None:
        """Add the images at any depth below `folder` to `found`, and its links to those to follow."""
        waiting = [folder]
        while waiting:
            place = waiting.pop()
            about = _stat(place)
            key = (about.st_dev, about.st_ino)
            if key in self._folders:
                self.passed_over.links += 1
                continue
            self._folders.add(key)
            with _scan(place) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
            # In a fixed order, so that of several names of a file the same one counts on every machine.
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _FOREIGN:
                    self.passed_over.hidden += 1
                elif entry.is_symlink() or _isjunction(entry.path):
                    self.links.append((entry.path, found))
                elif entry.is_dir():
                    waiting.append(entry.path)
                elif not entry.is_file():  # such as a named pipe, at which reading would wait for ever
                    self.passed_over.others += 1
                else:
                    self._add(entry.path, (about.st_dev, entry.inode()), found)

    def follow_links(self) -> None:
        """Enter linked folders, and add linked files; a link that leads nowhere counts as a file."""
        while self.links:
            path, found = self.links.pop(0)
            try:
                about = os.stat(path)  # noqa: PTH116  many files: no Path objects
            except OSError:  # reading it will report this
                self._add(path, None, found)
                continue
            if os.path.isdir(path):  # noqa: PTH112
                self.enter(path, found)
            elif not stat.S_ISREG(about.st_mode):
                self.passed_over.others += 1
            else:
                self._add(path, (about.st_dev, about.st_ino), found)

    def _add(self, path: str, key: _Key | None, found: list[str]) -> None:
        if not path.lower().endswith(SUFFIXES):
            suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
            self.passed_over.suffixes[suffix or "without ending"] += 1
        elif key is None:
            found.append(path)
        elif key in self._files and _same(self._files[key], path):
            self.passed_over.links += 1
        else:
            self._files[key] = path
            found.append(path)


def _same(one: str, other: str) -> bool:
    """Whether two names are of one file; some file systems give unrelated entries of a folder the same number."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except OSError:
        return False


def _subfolders(folder: Path) -> list[Path]:
    with _scan(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted(folder / name for name in names if not name.startswith(".") and name not in _FOREIGN)


def _class_folders(part: Path) -> list[Path]:
    """Return the class folders of a part, sorted.

    Raises:
        UserError: there are fewer than two, or they have parts instead of images.
    """
    classes = _subfolders(part)
    if len(classes) < 2:
        inner = len(classes) == 1 and len(_subfolders(classes[0])) > 1
        hint = f"; did you mean {classes[0]}?" if inner else ""
        raise UserError(f"{part} has {len(classes)} class folders; expected at least 2, one per class{hint}")
    for child in classes:
        parts = [path.name for path in _subfolders(child) if path.name.lower() in sum(_ROLES.values(), ())]
        if len(parts) > 1:
            raise UserError(
                f"class folder {child} has the parts {_some(parts)}; expected parts with class folders, such as "
                f"{part / parts[0] / child.name}"
            )
    return classes


def _no_images(folder: Path, passed_over: PassedOver) -> str:
    texts = passed_over.texts()
    besides = f" (passed over: {'; '.join(texts)})" if texts else ""
    return f"class folder {folder} holds no images; expected .jpg, .png, ...{besides}"


def _scan(folder: str | Path) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    # os.scandir, not rglob: it makes no system call per file, and ImageNet has 1.3 million files.
    try:
        return os.scandir(str(folder))
    except OSError as error:
        raise unreadable_folder(error) from None


def _stat(folder: str) -> os.stat_result:
    try:
        return os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise unreadable_folder(error) from None


def unreadable_folder(error: OSError) -> UserError:
    """Return the error for a folder that can't be read; passing over it would train on the remaining images."""
    return UserError(f"{error.filename} can't be read: {error.strerror}")


def _some(names: Iterable[str]) -> str:
    """Return up to three names, and "..." for further ones."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def same_classes(listings: Mapping[Path, Listing]) -> None:
    """Check that all parts have the classes of the first one.

    Raises:
        UserError: a part has other classes.
    """
    (first, reference), *others = listings.items()
    for part, listing in others:
        differing = sorted(set(reference.names) ^ set(listing.names))
        if differing:
            raise UserError(
                f"{first} has {len(reference.names)} classes and {part} has {len(listing.names)}; expected the same "
                f"classes (not in both: {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})"
            )
