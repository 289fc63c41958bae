"""Data sets of the library `datasets`: saved to disk, or as Parquet files with the bytes of the images."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from exitkit.data.csv_table import PARTS
from exitkit.data.items import Items
from exitkit.data.objects import ItemDataSet
from exitkit.errors import Note, UserError, unknown
from exitkit.plugins import setting

_LABELS = ("label", "labels", "target", "class")


@dataclass(frozen=True)
class HuggingFace(ItemDataSet):
    """A folder that `save_to_disk` of Hugging Face `datasets` has written, or Parquet files with the images' bytes.

    Its splits are train, and test and validation where it has them. Parquet files are a file FILE.parquet, or the files
    of a folder with the name of their split; `datasets` copies them into its cache.
    """

    named_by: ClassVar[str] = "folder"

    folder: str = setting(
        "", "the folder, or a Parquet file; --dataset hf:FOLDER sets it, and --data-dir DIR is the folder that it is in"
    )
    image: str | None = setting(None, "column of the images; none: the only one")
    label: str | None = setting(None, "column of the labels; none: the only one of class labels, or label")

    def parts(self, data_dir: Path | None) -> Mapping[str, Items]:
        """See `ItemDataSet.parts`."""
        path = self._path(data_dir)
        splits = _read(path)
        known: dict[str, Any] = {}
        for name, rows in splits.items():
            part = PARTS.get(name.lower())
            if part is None:
                warnings.warn(Note(f"{path}: the split {name} is passed over"), stacklevel=2)
            elif part in known:
                raise UserError(f"{path} has two splits for {part}, of which one is {name}; expected one of each part")
            else:
                known[part] = rows
        if "train" not in known:
            raise UserError(f"{path} has the splits {', '.join(map(str, splits))}; expected train")
        columns = self._columns(path, known["train"].features)
        names = _names(known["train"], columns[1])
        return {part: Items(_Rows(rows, columns, names, path), part) for part, rows in known.items()}

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`; None if the folder does not exist."""
        return super().digest(data_dir) if self._path(data_dir).exists() else None

    def _path(self, data_dir: Path | None) -> Path:
        if not self.folder:
            raise UserError("no folder of a data set is named; expected --dataset hf:FOLDER")
        return Path(self.folder) if data_dir is None else data_dir / Path(self.folder).name

    def _columns(self, path: Path, features: Mapping[str, Any]) -> tuple[str, str]:
        """Return the columns of the images and the labels."""
        images = [name for name, kind in features.items() if _holds_images(kind)]
        classes = [name for name, kind in features.items() if hasattr(kind, "names")]
        labels = classes or [name for name in _LABELS if name in features]
        chosen = []
        for what, given, matches in (("image", self.image, images), ("label", self.label, labels)):
            if given is not None and given not in features:
                raise unknown(f"column of {path}", given, features)
            if given is None and len(matches) != 1:
                matching = f"{len(matches)} columns that may be the {what}"
                raise UserError(
                    f"{path} has {matching} (its columns are {', '.join(features)}); choose one by --set {what}=COLUMN"
                )
            chosen.append(given or matches[0])
        return chosen[0], chosen[1]


class _Rows:
    """Rows of a split as (image, number of the class); `targets` and `classes` are named as those of torchvision."""

    def __init__(self, rows: Any, columns: tuple[str, str], names: list[str], path: Path) -> None:
        self._rows, self._image = rows.select_columns(list(columns)), columns[0]
        self.classes = names
        numbers = {name: number for number, name in enumerate(names)}
        values = list(rows[columns[1]])
        if not hasattr(rows.features[columns[1]], "names"):
            others = sorted({str(value) for value in values} - numbers.keys())
            if others:
                raise UserError(f"{path}: {', '.join(others[:5])} is a label of other images than those of train")
            values = [numbers[str(value)] for value in values]
        self.targets = values

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        # Imported when used: other data sets do not need Pillow.
        from PIL import Image

        value = self._rows[index][self._image]
        data = value.get("bytes") if isinstance(value, Mapping) else value
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        return image, self.targets[index]


def _read(path: Path) -> Mapping[str, Any]:
    """Return {split: rows} of a folder or a Parquet file; a data set without splits is all train."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder that save_to_disk wrote, or Parquet files")
    try:
        # Imported when used: the library is optional.
        import datasets
    except ImportError:
        raise UserError("data sets hf:FOLDER need datasets; install it with: pip install 'exitkit[hf]'") from None
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        with _quiet(datasets):
            if saved:
                loaded = datasets.load_from_disk(str(path))
            elif path.suffix == ".parquet":
                loaded = datasets.load_dataset("parquet", data_files=str(path))
            elif any(path.rglob("*.parquet")):
                loaded = datasets.load_dataset("parquet", data_dir=str(path))
            else:
                raise UserError(f"{path} is not a saved data set, and has no Parquet files; expected one of these")
    except UserError:
        raise
    except Exception as error:  # damaged files raise many types of error
        raise UserError(f"{path} can't be read ({' '.join(str(error).split()) or type(error).__name__})") from None
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Show no progress bars of `datasets` in this block."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _holds_images(kind: Any) -> bool:
    """Whether a column's type is images, or the bytes of image files, alone or with their path."""
    if isinstance(kind, Mapping):
        return "bytes" in kind
    return type(kind).__name__ == "Image" or getattr(kind, "dtype", "") in ("binary", "large_binary")


def _names(rows: Any, column: str) -> list[str]:
    """Return the class names: those of the column, or its values in ascending order."""
    names = getattr(rows.features[column], "names", None)
    return list(names) if names else [str(value) for value in sorted(set(rows[column]))]
