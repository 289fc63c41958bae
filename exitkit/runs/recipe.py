"""Recipes: the values that define a run, and the identity of the run.

Two runs of the same resolved recipe, on the same machine, are identical bit for bit. `exitkit.runs.job` resolves
recipes, and builds their data sets, networks and strategies.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from exitkit import plugins
from exitkit.errors import UserError, unknown
from exitkit.files import DEPTH, too_deep

# Keys that are not part of the identity: a run can be resumed on another device, or from another data folder.
EXECUTION = frozenset(
    {"device", "threads", "data_dir", "download", "init_from", "tensorboard", "compile", "deterministic"}
)
_BOOLEANS = ("download", "tensorboard", "compile", "deterministic")
_KINDS = ("method", "backbone", "dataset")

# Keys that earlier releases did not have: they are part of the identity unless they have their default.
FINE_TUNING = ("optimizer", "warmup", "trunk_lr_factor", "mixup", "cutmix", "weight_ema")
_ADDED = ("layout", *FINE_TUNING)
SETTABLE = frozenset({"schedule", "milestones", "decay", "momentum", "weight_decay", *FINE_TUNING})
"""Keys without an option of their own, which `with_settings` (`--set`) accepts beside the fields of plugins."""


class Recipe(BaseModel):
    """What to train, on what, and how: the keys of a recipe file. `resolve` replaces None by the data set's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str = Field("joint", description="a training method, or several as a+b")
    backbone: str | None = Field(None, description="a backbone or preset")
    dataset: str = Field("digits", description="a data set")
    method_settings: dict[str, Any] = Field({}, description="fields of the method")
    backbone_settings: dict[str, Any] = Field({}, description="fields of the backbone")
    dataset_settings: dict[str, Any] = Field({}, description="fields of the data set")
    init_from: str | None = Field(None, description="a finished run, or a weights file, to start from")
    init_weights: str | None = Field(None, description="digest of those weights; set by exitkit")
    ingredients: dict[str, str] = Field({}, description="digests of other runs that the method reads; set by exitkit")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of weights, order and augmentation (not of the split)")
    epochs: int | None = Field(None, ge=1, description="number of epochs; of a method with phases, see its page")
    batch_size: int | None = Field(None, ge=2, description="images per step, over all ranks")
    lr: float | None = Field(None, gt=0, description="initial learning rate")
    schedule: Literal["cosine", "step", "constant"] | None = Field(None, description="schedule of the learning rate")
    milestones: tuple[float, ...] | None = Field(
        None, description="shares of the epochs after which `step` lowers the rate"
    )
    decay: float = Field(0.1, gt=0, lt=1, description="factor of the rate at each milestone")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimiser of phases without one of their own")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD, beta_1 of AdamW")
    weight_decay: float | None = Field(None, ge=0, description="weight decay of every parameter; of AdamW: decoupled")
    warmup: float = Field(0.0, ge=0, description="epochs of a phase in which the rate rises linearly")
    trunk_lr_factor: float = Field(1.0, gt=0, description="learning rate of the trunk, over that of the heads")
    mixup: float = Field(0.0, ge=0, description="mix two images and their labels: alpha of Beta(alpha, alpha); 0: off")
    cutmix: float = Field(0.0, ge=0, description="paste a part of one image into another: alpha as of mixup; 0: off")
    weight_ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights; 0: none")
    probe_every: int | None = Field(None, ge=1, description="epochs between two probes of a fixed batch, for diagnose")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field("fp32", description="arithmetic of training")
    layout: Literal["auto", "contiguous", "channels-last"] = Field("auto", description="memory layout of training")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads per process; may change the last digits")
    compile: bool = Field(False, description="compile the network's stages and heads (torch.compile)")
    deterministic: bool = Field(True, description="deterministic kernels on a GPU; false: the fastest ones")
    data_dir: str | None = Field(None, min_length=1, description="folder of the images")
    download: bool = Field(True, description="download missing images, if torchvision can")
    tensorboard: bool = Field(False, description="also write a TensorBoard log into the run's folder")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        bad = [key for key in values if key not in cls.model_fields] if isinstance(values, Mapping) else []
        if bad:
            raise UserError("; ".join(str(unknown("key of a recipe", key, cls.model_fields)) for key in bad))
        numbers = {key: value for key, value in values.items() if key not in _BOOLEANS}
        booleans = [f"{key} is {value}" for key, value in numbers.items() if isinstance(value, bool)]
        if booleans:
            raise UserError(f"{'; '.join(booleans)}; expected a number or a name")
        return values

    @model_validator(mode="after")
    def _milestones_ascend(self) -> Self:
        marks = self.milestones or ()
        if any(not 0 < mark < 1 for mark in marks) or list(marks) != sorted(set(marks)):
            raise ValueError("milestones must be ascending shares of the schedule, between 0 and 1")
        return self

    @classmethod
    def make(cls, **values: Any) -> Self:
        """Make a recipe from values; one error message describes all wrong values.

        Raises:
            UserError: a key is unknown (the message gives the nearest ones), or a value is impossible.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError("; ".join(_explain(item) for item in error.errors())) from None

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """Read the values of a recipe file, TOML or JSON (such as the `recipe.json` of a run).

        Raises:
            UserError: the file does not exist, is neither TOML nor JSON, or is nested too deeply.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a byte order mark
            values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise UserError(f"recipe {path} can't be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"recipe {path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"recipe {path} contains a {type(values).__name__}; expected a table of keys")
        if key := too_deep(values):
            raise UserError(f"recipe {path}: {key} is nested more than {DEPTH} levels deep; expected fields and values")
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def with_values(self, **values: Any) -> Self:
        """Return this recipe with some values replaced, validated again."""
        return self.make(**(self.model_dump() | values))

    def with_settings(self, pairs: Mapping[str, Any]) -> Self:
        """Return this recipe with fields of method, backbone or data set, and keys of training, set by name.

        Args:
            pairs: {field: value}; a field that two of them have is named `method.field`, `backbone.field`,
                `dataset.field` or `training.field`.

        Raises:
            UserError: none of them has the field (the message gives the nearest ones), or several have.
        """
        known = self._fields()
        changed: dict[str, dict[str, Any]] = {kind: dict(getattr(self, f"{kind}_settings")) for kind in _KINDS}
        changed["training"] = {}
        for key, value in pairs.items():
            prefix, _, rest = key.partition(".")
            kinds = [prefix] if prefix in known and rest in known[prefix] else [k for k in known if key in known[k]]
            field = rest if kinds == [prefix] else key
            if not kinds:
                where = f"the {prefix}" if prefix in known else f"{self.method}, {self._backbone()} or {self.dataset}"
                fields = known[prefix] if prefix in known else set().union(*known.values())
                if key in type(self).model_fields:
                    raise UserError(f"{key} is a key of a recipe, not a field; set {key} = ... in a file for --recipe")
                raise unknown(f"field of {where}", rest if prefix in _KINDS else key, fields)
            if len(kinds) > 1:
                raise UserError(
                    f"{' and '.join(kinds)} have a field {key!r}; use {' or '.join(f'{k}.{key}' for k in kinds)}"
                )
            changed[kinds[0]][field] = value
        typed = {key: self.typed(key, value) for key, value in changed["training"].items()}
        return self.with_values(**{f"{kind}_settings": changed[kind] for kind in _KINDS}, **typed)

    @classmethod
    def typed(cls, key: str, value: Any) -> Any:
        """Return the value of a key, converted to its type if it is text from the command line.

        Raises:
            UserError: the text is not of this type.
        """
        return plugins.check_value(key, cls.model_fields[key].annotation, value) if isinstance(value, str) else value

    def settable(self) -> set[str]:
        """Return all names that `with_settings` accepts."""
        known = self._fields()
        return set().union(*known.values()) | {f"{kind}.{field}" for kind in known for field in known[kind]}

    def _backbone(self) -> str:
        return self.backbone or str(plugins.underlying(plugins.load("dataset", self.dataset)).house["backbone"])

    def _fields(self) -> dict[str, set[str]]:
        """Return the names by kind (method, ...); those of the fields of a method's parts also with a prefix."""

        def names(kind: str, name: str) -> set[str]:
            return set(plugins.fields(plugins.load(kind, name)))

        parts = {part: names("method", part) for part in plugins.method_parts(self.method)}
        prefixed = {f"{part}.{field}" for part, fields in parts.items() for field in fields}
        return {
            "method": set().union(*parts.values()) | prefixed,
            "backbone": names("backbone", self._backbone()),
            "dataset": names("dataset", self.dataset),
            "training": set(SETTABLE),
        }

    def identity(self) -> dict[str, Any]:
        """Return the values that identify the run: all except those of execution; meant for a resolved recipe.

        All settings of a plugin that is not installed are part of the identity.
        """
        identity = {key: value for key, value in self.model_dump(mode="json").items() if key not in EXECUTION}
        if not self.ingredients:
            del identity["ingredients"]  # most runs read no other run, and earlier releases had no such key
        for key in _ADDED:
            if getattr(self, key) == type(self).model_fields[key].default:
                del identity[key]
        for kind, name in (("backbone", self._backbone()), ("dataset", self.dataset)):
            identity[f"{kind}_settings"] = plugins.identifying(kind, name, identity[f"{kind}_settings"])
        identity["method_settings"] = self._identifying_method(identity["method_settings"])
        return identity

    def _identifying_method(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        parts = self.method.split("+")
        if len(parts) == 1:
            return plugins.identifying("method", self.method, settings)
        return {
            f"{part}.{key}": value
            for part in parts
            for key, value in plugins.identifying(
                "method",
                part,
                {key.removeprefix(f"{part}."): v for key, v in settings.items() if key.startswith(f"{part}.")},
            ).items()
        }

    @property
    def place_of_images(self) -> str:
        """Where the images are, for messages: `in FOLDER`, or `of DATA SET`."""
        return f"of {self.dataset}" if self.data_dir is None else f"in {self.data_dir}"

    @property
    def id(self) -> str:
        """Name of the run's folder; it is readable, and contains a digest of `identity`."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        end = f"-s{self.seed}-{digest}"
        name = "-".join([self.method, self.backbone or "", self.dataset])
        # A data set may be named with a path. The longest name of a file has 255 characters; a failure's has 5 more
        # than the run's, and its draft 15 more.
        return re.sub(r"[^A-Za-z0-9.+_-]", "-", name[: 235 - len(end)] + end)


class ResolvedRecipe(Recipe):
    """A recipe in which every value is set, as a run's `recipe.json` stores it."""

    backbone: str
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    lr: float = Field(gt=0)
    schedule: Literal["cosine", "step", "constant"]
    milestones: tuple[float, ...] = ()
    weight_decay: float = Field(ge=0)
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"


def flat_identity(recipe: Recipe) -> dict[str, str]:
    """Return the identity of a resolved recipe as a flat dictionary; see `RunFolder.identity`."""
    flat: dict[str, str] = {}
    for key, value in recipe.identity().items():
        if isinstance(value, Mapping):
            flat.update({f"{key.removesuffix('_settings')}.{name}": json.dumps(item) for name, item in value.items()})
        else:
            flat[key] = json.dumps(value)
    return flat


def _explain(item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{where} is missing"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{where} is {item['input']!r:.200}; {message}" if where else message
