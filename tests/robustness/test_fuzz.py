"""Whatever is given, it works or is refused in one line: recipes and fields. Nothing is trained here.

The quick profile draws the same examples each time; `-m full` draws many, and others every time.
"""

import string
import typing
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exitkit import Recipe, plugins
from exitkit.data.base import build_dataset
from exitkit.errors import Note, UserError
from exitkit.networks.build import build_network
from exitkit.strategy.composition import build_strategy

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
QUICK = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=CHECKS, database=None)
LONG = settings(QUICK, max_examples=3000, derandomize=False)
EXTREMES = [0, -1, 1, 2, 10**30, -(10**400), 0.5, 1e-320, 1e308, -0.0, float("nan"), float("inf"), True, None]
WORDS = [
    "",
    " ",
    "none",
    "nan",
    "1e999",
    "-1",
    "0,0",
    "1,,2",
    "../..",
    "a+b",
    "+",
    ":",
    "ge+",
    "paper",
    "released",
    "\x00",
]
WORDS += ["\ud800", "é" * 300, "[" * 2000, "9" * 5000, "torchvision:", "all", "-", "--", "=", "x=", "=x", "/dev/null"]

scalars = st.sampled_from(EXTREMES) | st.sampled_from(WORDS) | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.ascii_letters + "_.", max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
sensible = st.sampled_from([1, 2, 3, 4, 0.1, 0.5, 0.9, "1,2,1", "true", "none"])


def names(kind):
    return st.sampled_from(sorted(plugins.registered(kind)))


def values_of(kind, name):
    """Fields of a plugin by name, with values that may or may not be right."""
    plugin = plugins.load(kind, name)
    hints = typing.get_type_hints(plugins.underlying(plugin))
    choices = {}
    for field in plugins.fields(plugin):
        literal = [
            v
            for part in plugins._parts(hints[field])
            for v in typing.get_args(part)
            if typing.get_origin(part) is typing.Literal
        ]
        choices[field] = sensible | anything | (st.sampled_from(literal) if literal else st.nothing())
    return st.fixed_dictionaries({}, optional=choices).filter(lambda values: len(values) <= 4)


def works_or_is_refused(action):
    """Call it; a UserError has to be one line that says something, and nothing else may come out."""
    with warnings.catch_warnings(action="ignore", category=Note):
        try:
            action()
        except UserError as error:
            assert str(error).strip()


def check_recipe(data):
    keys = st.sampled_from(sorted(Recipe.model_fields)) | st.text(max_size=6)
    values = data.draw(st.dictionaries(keys, anything, max_size=4))
    works_or_is_refused(lambda: Recipe.make(**values).resolve())


def check_method(data):
    name = data.draw(names("method"))
    values = data.draw(values_of("method", name))

    def build():
        strategy = build_strategy(name, **values)
        for phase in strategy.phases(2, 4):
            phase.strategy.adapt(build_network("msdnet-tiny"))
        Recipe.make(method=name, method_settings=values).resolve()

    works_or_is_refused(build)


def check_fields_of_network_and_data(data):
    kind = data.draw(st.sampled_from(["backbone", "dataset"]))
    name = data.draw(names(kind))
    values = data.draw(values_of(kind, name))
    works_or_is_refused(lambda: plugins.configure(kind, name, values))
    if kind == "dataset":
        works_or_is_refused(lambda: build_dataset(name, values))
    works_or_is_refused(lambda: Recipe.make(**{kind: name, f"{kind}_settings": values}).resolve())


def check_network(data):
    """Small networks are built; a large one that is asked for would be made, and take its time."""
    name = data.draw(st.sampled_from(["msdnet-tiny", "ranet-tiny", "sdn-tiny"]))
    small = st.sampled_from([-3, -1, 0, 1, 2, 3, 4, 0.5, None, True, "1,2", "1,1,2", (), (0,), (1, 2, 4), "none", "x"])
    fields = sorted(plugins.fields(plugins.load("backbone", name)))
    values = data.draw(st.dictionaries(st.sampled_from(fields), small, max_size=3))
    shape = data.draw(st.none() | st.tuples(*[st.integers(1, 24)] * 3))
    works_or_is_refused(
        lambda: build_network(name, num_classes=data.draw(st.integers(-1, 12)), input_shape=shape, **values)
    )


FUZZED = [check_recipe, check_method, check_fields_of_network_and_data, check_network]


@pytest.mark.parametrize("check", FUZZED)
def test_settings_work_or_are_refused(check):
    QUICK(given(st.data())(check))()


@pytest.mark.full
@pytest.mark.parametrize("check", FUZZED)
def test_many_settings_work_or_are_refused(check):
    LONG(given(st.data())(check))()
