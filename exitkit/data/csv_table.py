"""Image files that a CSV table lists, with their labels and parts."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from exitkit.data.base import Data
from exitkit.data.image_files import digest_of
from exitkit.data.images import ImageDataSet
from exitkit.errors import Note, UserError, unknown
from exitkit.plugins import setting

if TYPE_CHECKING:
    import pandas as pd

    from exitkit.data.inventory import Inventory
    from exitkit.data.split import Split

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
}
"""{name in the column `split`: part}."""


@dataclass(frozen=True)
class ImageTable(ImageDataSet):
    """Image files that a CSV table lists in the columns path, label and split (train, validation or test).

    Paths are relative to the table's folder. Without a column split, a fifth of the images is drawn as the test part,
    and a tenth of the others as the validation part, stratified. Other columns are ignored.
    """

    named_by: ClassVar[str] = "file"

    file: str = setting("", "the table; --dataset csv:FILE sets it, and --data-dir DIR is the folder that it is in")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Read the table; see `DataSet.load`."""
        table = self._read(self._path(data_dir))
        _check_files(self._path(data_dir), table)
        table["label"] = table["label"].str.strip()
        names = _class_names(self._path(data_dir), table)
        numbers = {name: number for number, name in enumerate(names)}
        paths: dict[str, list[str]] = {}
        labels: dict[str, Tensor] = {}
        for part, rows in table.groupby("split"):
            paths[str(part)] = rows["path"].tolist()
            labels[str(part)] = torch.tensor([numbers[label] for label in rows["label"]])
        arranged = self.arranged(names, labels["train"], labels.get("test"), labels.get("validation"))
        training = paths["train"] + (paths.get("validation", []) if self.validation is None else [])
        return self.of_files(names, arranged, training, paths.get("test", training))

    def root(self, data_dir: Path | None) -> Path:
        """See `DataSet.root`."""
        return self._path(data_dir).parent

    def restore(self, inventory: Inventory, root: Path, class_names: list[str], split: Split) -> Data:
        """See `DataSet.restore`; the labels are the run's, and a `Note` says how many the table has changed since."""
        path = self._path(root)
        with contextlib.suppress(UserError):  # the table is gone or damaged, and is not needed
            table = self._read(path)
            known = {str(root / name): class_names[label] for name, label in inventory.labelled()}
            changed = [
                name
                for name, label in zip(table["path"], table["label"], strict=True)
                if known.get(name, label).strip() != label.strip()
            ]
            if changed:
                message = f"{path} now gives {len(changed)} of the run's images another label (such as {changed[0]})"
                warnings.warn(Note(f"{message}; the run's labels are used"), stacklevel=2)
        return super().restore(inventory, root, class_names, split)

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`; it changes if a row or an image changes, but not if both are moved."""
        path = self._path(data_dir)
        if not path.is_file():
            return None
        table = self._read(path)
        digest = hashlib.sha256(digest_of(path.parent, table["path"].tolist()).encode())
        digest.update(table[["label", "split"]].to_csv(index=False).encode())
        return digest.hexdigest()[:16]

    def _path(self, data_dir: Path | None) -> Path:
        if not self.file:
            raise UserError("no table of images is named; expected --dataset csv:FILE")
        return Path(self.file) if data_dir is None else data_dir / Path(self.file).name

    def _read(self, path: Path) -> pd.DataFrame:
        """Return the rows of a table: path (with its folder), label, and split, a value of `PARTS`."""
        try:
            table = _cells(path)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
        except ValueError as error:  # not text, without columns, or rows of different lengths
            raise UserError(f"{path} is not a CSV table: {' '.join(str(error).split())}") from None
        missing = [name for name in ("path", "label") if name not in table]
        if missing:
            raise UserError(
                f"{path} has no column {' and '.join(missing)} (its columns are {', '.join(map(str, table))}); "
                "expected path, label and, if the parts are given, split"
            )
        _check_cells(path, table)
        if "split" not in table:
            table["split"] = "train"
        table["split"] = [_part(path, row, name) for row, name in enumerate(table["split"])]
        if "train" not in set(table["split"]):
            raise UserError(f"{path} lists no training images; expected rows whose split is train")
        table["path"] = [str(path.parent / name) for name in table["path"]]
        return table[["path", "label", "split"]]


def _cells(path: Path) -> pd.DataFrame:
    """Return all cells of a table as text; a comma at the end of a row is no cell.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no table.
    """
    # Imported when used: other data sets do not need it.
    import pandas as pd

    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    table: pd.DataFrame = pd.read_csv(path, **options)
    if isinstance(table.index, pd.RangeIndex):
        return table
    # The first row is longer than the header: pandas takes its first cells for the names of rows.
    if (table.iloc[:, -1] != "").any():
        raise ValueError("rows have more cells than the header; expected quotes around a cell with a comma")
    with warnings.catch_warnings(action="ignore", category=pd.errors.ParserWarning):
        whole: pd.DataFrame = pd.read_csv(path, index_col=False, **options)
    return whole


def _line(path: Path, row: int) -> int:
    """Return the number of the first line of a row, from 0; blank lines are no rows, and a cell may have several."""
    lines, end = [], 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for cells in reader:
            if len(cells) > 1 or (cells and cells[0].strip()):
                lines.append(end + 1)
            end = reader.line_num
    return lines[row + 1]


def _part(path: Path, row: int, name: Any) -> str:
    known = str(name).strip().lower()
    if known not in PARTS:
        fault = unknown("split", str(name), ("train", "validation", "test"))
        raise UserError(f"{path}, line {_line(path, row)}: {fault}")
    return PARTS[known]


def _check_cells(path: Path, table: pd.DataFrame) -> None:
    """Check that every row has a path and a label, and that no image is listed twice."""
    for column in ("path", "label"):
        empty = table.index[table[column].str.strip() == ""]
        if len(empty):
            raise UserError(f"{path}, line {_line(path, empty[0])}: {column} is empty")
    twice = table.index[table["path"].duplicated()]
    if len(twice):
        name = table["path"][twice[0]]
        first = table.index[table["path"] == name][0]
        lines = f"{_line(path, first)} and {_line(path, twice[0])}"
        raise UserError(f"{path} lists {name} twice, in lines {lines}; expected each image once")


def _check_files(path: Path, table: pd.DataFrame) -> None:
    """Check that no file is listed under two names, such as that of a link and its own."""
    first: dict[tuple[int, int], str] = {}
    for name in table["path"]:
        if "\0" in name:
            raise UserError(f"{path} lists {name!r:.60}, which has a NUL character; expected the name of a file")
        with contextlib.suppress(OSError):  # a missing file is reported when it is read
            about = Path(name).stat()
            other = first.setdefault((about.st_dev, about.st_ino), name)
            if other != name:
                raise UserError(f"{path} lists {other} and {name}, which are one file; expected each image once")


def _class_names(path: Path, table: pd.DataFrame) -> list[str]:
    """Return the labels of the training images in ascending order: as numbers if all are integers, else as text."""
    names = set(table["label"][table["split"] == "train"])
    for part in ("validation", "test"):
        others = sorted(set(table["label"][table["split"] == part]) - names)
        if others:
            raise UserError(
                f"{path}: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''} is a label of {part} images, and "
                "of no training image; expected the same classes"
            )
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} class; expected at least 2 labels")
    numbers = all(name.removeprefix("-").isdecimal() and len(name) < 19 for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names)  # 1 and 01 are two classes
