"""The table of a run's image files, stored with the run.

A network that is trained can be evaluated as long as images of its validation and test parts are left: the table has
the class of each file, and what is needed to tell a file that was replaced from the file of the run.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exitkit.data.decoding import UnreadableImage, read_image
from exitkit.errors import UserError

if TYPE_CHECKING:
    from exitkit.data.split import Split

_COLUMNS = ("list", "class", "file", "bytes", "head")
_HEADS, _HEAD_BYTES = 1_000, 65_536  # files whose first bytes are compared, and their number


class FileFacts(NamedTuple):
    """The size of a file in bytes, and a digest of its first bytes, or "" if it was not read."""

    size: int
    head: str


class Faults(NamedTuple):
    """Files that differ from those of the run: {name: message} of missing and damaged ones, and names of other images.

    A file is another image if it can be read, but has other content than that of the run.
    """

    unreadable: dict[str, str]
    replaced: list[str]


@dataclass(frozen=True)
class Inventory:
    """The image files of a run; names are relative to the data folder.

    Attributes:
        train_files, test_files: names, in the order that the indices of a split refer to; the same list if one folder
            has both.
        train_labels, test_labels: int64 [N], their classes.
        facts: {name: facts} of the validation and test images.
    """

    train_files: list[str]
    test_files: list[str]
    train_labels: Tensor
    test_labels: Tensor
    facts: Mapping[str, FileFacts]

    @classmethod
    def of(
        cls, root: Path, train_paths: list[str], test_paths: list[str], labels: tuple[Tensor, Tensor], split: Split
    ) -> Inventory:
        """Make the table of the files of a split.

        Raises:
            UserError: a validation or test image can't be read.
        """
        train_files = [os.path.relpath(path, root) for path in train_paths]
        same = test_paths is train_paths
        test_files = train_files if same else [os.path.relpath(path, root) for path in test_paths]
        names = [train_files[index] for index in split.validation.tolist()]
        names += [test_files[index] for index in split.test.tolist()]
        step = max(1, -(-len(names) // _HEADS))
        facts = {name: _facts(root / name, with_head=number % step == 0) for number, name in enumerate(names)}
        return cls(train_files, test_files, *labels, facts)

    def compare(self, root: Path) -> Faults:
        """Compare the validation and test images with the files that are now below `root`."""
        unreadable, replaced = {}, []
        for name, known in self.facts.items():
            path = str(root / name)
            try:
                if _facts(root / name, with_head=bool(known.head)) != known:
                    read_image(path)
                    replaced.append(name)
            except UnreadableImage as error:
                unreadable[name] = str(error)
        return Faults(unreadable, replaced)

    def labelled(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the class of each file."""
        yield from zip(self.train_files, self.train_labels.tolist(), strict=True)
        yield from zip(self.test_files, self.test_labels.tolist(), strict=True)

    def check_listing(self, now: Inventory, label: str) -> None:
        """Check that a folder has the same files, with the same classes, as when a run began.

        Args:
            now: the table of the files that are in the folder now.
            label: name of the run in messages.

        Raises:
            UserError: files were added or removed, or have other classes.
        """
        known, found = dict(self.labelled()), dict(now.labelled())
        moved = {name for name in known.keys() & found.keys() if known[name] != found[name]}
        texts = []
        for verb, names in (
            ("gone", known.keys() - found.keys()),
            ("new", found.keys() - known.keys()),
            ("of another class", moved),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                texts.append(f"{len(names)} {verb} ({', '.join(sorted(names)[:3])}{more})")
        if texts:
            raise UserError(
                f"{label} began with other files: {', '.join(texts)}; restore them, or choose another --out"
            )

    def dump(self) -> bytes:
        """Return the table as a compressed CSV file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(self._rows())
        return gzip.compress(text.getvalue().encode(errors="surrogateescape"), mtime=0)

    def _rows(self) -> Iterator[tuple[object, ...]]:
        lists = {"both": (self.train_files, self.train_labels)}
        if self.test_files is not self.train_files:
            lists = {"train": (self.train_files, self.train_labels), "test": (self.test_files, self.test_labels)}
        for which, (files, labels) in lists.items():
            for name, label in zip(files, labels.tolist(), strict=True):
                yield which, label, name.replace(os.sep, "/"), *self.facts.get(name, ("", ""))

    @classmethod
    def read(cls, path: Path) -> Inventory:
        """Read a stored table.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            text = gzip.decompress(path.read_bytes()).decode(errors="surrogateescape")
            return cls._parse(csv.DictReader(io.StringIO(text, newline="")))
        except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}); expected the run's table of images") from None

    @classmethod
    def _parse(cls, rows: Iterable[Mapping[str, str]]) -> Inventory:
        files: dict[str, list[str]] = {"train": [], "test": [], "both": []}
        labels: dict[str, list[int]] = {"train": [], "test": [], "both": []}
        facts = {}
        for row in rows:
            name = row["file"].replace("/", os.sep)
            files[row["list"]].append(name)
            labels[row["list"]].append(int(row["class"]))
            if row["bytes"]:
                facts[name] = FileFacts(int(row["bytes"]), row["head"])
        if files["both"]:
            both = torch.tensor(labels["both"])
            return cls(files["both"], files["both"], both, both, facts)
        return cls(files["train"], files["test"], torch.tensor(labels["train"]), torch.tensor(labels["test"]), facts)

    def paths(self, root: Path) -> tuple[list[str], list[str]]:
        """Return the paths of the training list and the test list below `root`."""
        train = [os.path.join(root, name) for name in self.train_files]  # noqa: PTH118  many files: no Path objects
        if self.test_files is self.train_files:
            return train, train
        return train, [os.path.join(root, name) for name in self.test_files]  # noqa: PTH118


def _facts(path: Path, with_head: bool) -> FileFacts:
    try:
        size = path.stat().st_size
        if not with_head:
            return FileFacts(size, "")
        with path.open("rb") as file:
            return FileFacts(size, hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()[:16])
    except FileNotFoundError:
        raise UnreadableImage(str(path), "does not exist") from None
    except OSError as error:
        raise UnreadableImage(str(path), f"can't be read: {error.strerror}") from None
