"""The page about deployment holds: its three commands, its service, its table of files and its words about programs."""

import asyncio
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest

import exitkit
from exitkit.cli import main
from exitkit.inference.export import runner
from exitkit.inference.laplace import LAPLACE
from exitkit.inference.policy import KNOWN, PolicyName, fit_policy
from exitkit.inference.rules import RULES

from doc_pages import ROOT
from toy import FEW

PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"in three commands:.*?```sh\n(.*?)```", PAGE, flags=re.DOTALL)[1].splitlines()
SERVICE = re.search(r"for `uvicorn service:app`:.*?```python\n(.*?)```", PAGE, flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, exported by the first of the three commands."""
    folder = tmp_path_factory.mktemp("place")
    run = exitkit.train({"backbone": "sdn-tiny", "epochs": 2, "device": "cpu", **FEW}, folder / "runs")
    words = shlex.split(COMMANDS[0].replace("RUN", run.path.name))
    assert words[0] == "exitkit"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end, warnings.catch_warnings():
        patch.chdir(folder)
        main(words[1:])
    assert end.value.code == 0
    return folder


def test_three_commands_lead_from_a_run_to_an_answered_request(place, monkeypatch):
    monkeypatch.chdir(place)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    python, *serve, background = shlex.split(COMMANDS[1].replace("8000", port))
    curl, *ask = shlex.split(COMMANDS[2].replace("8000", port))
    assert (len(COMMANDS), python, background, curl) == (3, "python", "&", "curl")
    service = subprocess.Popen([sys.executable, *serve], stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout.readline().startswith(f"serving on http://127.0.0.1:{port} ")
        if shutil.which(curl):
            answer = subprocess.run([curl, "--silent", *ask], capture_output=True, check=True, timeout=60).stdout
        else:
            answer = httpx.post(ask[-1], content=Path(ask[1].removeprefix("@")).read_bytes()).content
    finally:
        service.kill()
        service.wait(10)
    shown = re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    parsed = httpx.Response(200, content=answer).json()
    assert parsed.keys() == httpx.Response(200, content=shown).json().keys()
    examples = runner.open_runner(Path("deployed")).policy["examples"]
    assert (parsed["index"], parsed["exit"]) == (examples["classes"][0], examples["exits"][0])


def test_the_service_of_the_page_answers_and_is_short(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    space = {}
    exec(compile(SERVICE, "service.py", "exec"), space)
    sys.modules.pop("run")
    assert len([line for line in SERVICE.splitlines() if line]) <= 20

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(space["app"]), base_url="http://here") as client:
            return await client.post("/classify", content=Path("deployed/example.png").read_bytes())

    examples = space["runner"].policy["examples"]
    answer = asyncio.run(ask()).raise_for_status().json()
    assert answer == {"class": str(examples["classes"][0]), "exit": examples["exits"][0]}


def test_the_table_lists_the_files_of_a_bundle(place):
    listed = set(re.findall(r"`([\w.-]+\.(?:onnx|json|py|npy|png))`", PAGE.partition("## Predictions")[0]))
    # serve.py imports run.py, of which Python keeps the bytecode.
    files = {path.name for path in (place / "deployed").iterdir() if path.name != "__pycache__"}
    assert {re.sub(r"stage-\d+", "stage", name) for name in files} == {
        re.sub(r"stage-\d+", "stage", name) for name in listed
    }


FIELDS = PAGE.partition("## The fields of policy.json")[2].partition("\n## ")[0]


def rows(table):
    """Return {name: contents} of the n-th table of the fields; a row may name several fields."""
    body = re.findall(r"(?:^\|.*\n)+", FIELDS, flags=re.MULTILINE)[table].splitlines()[2:]
    cells = [line.strip("| ").split(" | ", 1) for line in body]
    return {name: contents for names, contents in cells for name in re.findall(r"`([\w-]+)`", names)}


def test_the_page_has_every_field_of_a_policy_and_what_is_in_it(place):
    policy = json.loads((place / "deployed/policy.json").read_text(encoding="utf-8"))
    facts, rule = rows(0), rows(1)
    assert policy.keys() == (facts.keys() - {"precision"}) | rule.keys()
    inside = {
        "costs": policy["costs"][0],
        "expected": {"unit": "", **policy["expected"]["test"], "validation": 0, "test": 0},
        "points": policy["points"][0],
        "preprocessing": policy["preprocessing"],
        "examples": policy["examples"],
    }
    for name, table in inside.items():
        assert table.keys() <= set(re.findall(r"`(\w+)`", facts[name])), name
    assert policy["thresholds"][-1] == "-inf" and len(policy["thresholds"]) == len(policy["programs"])
    assert all(point["policy"].keys() == rule.keys() for point in policy["points"])


PAIRS = [("plain", name) for name in RULES] + [(name, "shares") for name in KNOWN if name not in ("plain", *LAPLACE)]


@pytest.mark.parametrize(("combination", "name"), PAIRS)
def test_the_page_has_the_arrays_of_every_rule_and_combination(combination, name):
    generator = np.random.default_rng(0)
    labels, (exits, classes) = generator.integers(0, 5, 60), (3, 5)
    logits = generator.normal(size=(60, exits, classes)) + np.eye(classes)[labels][:, None]
    policy = json.loads(fit_policy(PolicyName(combination, rule=name), logits, labels, [1, 2, 3]).at(0).to_json())
    assert (policy.keys() - {"combination"}) in ({"rule"}, rows(1).keys())
    assert ("combination" in policy) == (combination != "plain")
    if "combination" in policy:
        words = FIELDS.partition("Both forms may have a table")[2].partition("`laplace`")[0]
        assert policy["combination"].keys() == set(re.findall(r"`(\w+)`", words)) - {"combination"}
    if "rule" in policy:
        table, documented = policy["rule"], rows(2)[name]
        assert table.keys() - {"name"} == set(re.findall(r"`(\w+)`", documented))
        sizes = {"K": exits, "C": classes, "K - 1": exits - 1, "K + 1": exits + 1}
        for field, shape in re.findall(r"`(\w+)` \[([^\]]*)\]", documented):
            wanted = [sizes[side] if side in sizes else int(side) for side in shape.split(", ")]
            assert table[field]["shape"] == wanted, field


def test_programs_have_the_opset_of_the_page_and_any_batch_size(place):
    folder = place / "deployed"
    exported = runner.open_runner(folder, threads=1)
    for name in (*exported.policy["programs"], exported.policy["all_exits"]):
        program = onnx.load(folder / name)
        (opset,) = [each.version for each in program.opset_import if each.domain in ("", "ai.onnx")]
        assert f"opset {opset} " in PAGE, opset
        for value in (*program.graph.input, *program.graph.output):
            first = value.type.tensor_type.shape.dim[0]
            assert first.dim_param and not first.dim_value, value.name
    generator = np.random.default_rng(0)
    for count in (1, 2, 7, 65):
        images = exported.normalised(generator.integers(0, 256, (count, 1, 16, 16), np.uint8))
        outputs, exits = exported(images)
        alone = [exported(image[None]) for image in images]
        np.testing.assert_array_equal(exits, np.concatenate([each[1] for each in alone]))
        np.testing.assert_allclose(outputs, np.concatenate([each[0] for each in alone]), rtol=1e-3, atol=1e-4)
