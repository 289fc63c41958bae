"""Ways in which a file of a run can be wrong."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Malicious:
    """Unpickled, it would touch a file."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def _written(content):
    return lambda path: path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def _folder(path):
    path.unlink()
    path.mkdir()


def _tensors(change):
    def damage(path):
        changed = {name: change(value).contiguous() for name, value in load_file(path).items()}
        save_file(changed, path)

    return damage


def _without_first(path):
    save_file(dict(sorted(load_file(path).items())[1:]), path)


def _only_head(path):
    path.write_text(path.read_text().splitlines()[0].replace("e", "x") + "\n")


def _words(path):
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(",".join("x" for _ in row.split(",")) for row in rows)]) + "\n")


def _edited(change):
    def damage(path):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def _emptied(value):
    """Keep the outer shape and lose what is in it."""
    return dict.fromkeys(value) if isinstance(value, dict) else [{} for _ in value]


ANY = {"empty": _written(b""), "cut": _cut, "zeros": _zeros, "gone": Path.unlink, "a folder": _folder}
JSON = ANY | {
    "a list": _written(b"[]"),
    "null": _written(b"null"),
    "a number": _written(b"1"),
    "a million brackets": _written(b"[" * 1_000_000),
    "a number of 6000 digits": _written(b"9" * 6000),
    "no text": _written(b"\xff\xfe\x00"),
    "emptied": _edited(_emptied),
}
TENSORS = ANY | {
    "without a tensor": _without_first,
    "half as long": _tensors(lambda value: value[: len(value) // 2] if value.dim() else value),
    "flat": _tensors(lambda value: value.flatten() if value.dim() != 1 else value[None]),
    "far away": _tensors(lambda value: value + 10**6 if value.dtype == torch.int64 else value * float("nan")),
    "below zero": _tensors(lambda value: -value - 1 if value.dtype == torch.int64 else value * float("nan")),
    "of another type": _tensors(lambda value: value.int() if value.is_floating_point() else value.double()),
}
CSV = ANY | {"no text": _written(b"\xff\xfe\x00"), "other columns": _only_head, "words": _words}


def pickled(path):
    """Put a checkpoint there that would do something when it is read."""
    torch.save({"network": Malicious(), "position": pickle.dumps(Malicious())}, path)
