"""Peak memory, and what methods have learned, in the run folder."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

import exitkit
from exitkit.cli import cli
from exitkit.engine import memory
from exitkit.engine.memory import available_mib

from toy import FEW

PEAK = """
import numpy as np, torch
from exitkit.engine.memory import begin_peak, peak_mib
cpu = torch.device("cpu")
begin_peak(cpu)
low = peak_mib(cpu)
block = np.ones(256 * 2**20 // 8)
high = peak_mib(cpu)
del block
begin_peak(cpu)
print(low, high, peak_mib(cpu))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forget no peak")
def test_a_peak_is_seen_and_forgotten():
    # In a process of its own: one that has freed much before takes from that, and does not grow.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    low, high, after = map(float, done.stdout.split())
    assert 250 < high - low < 300 and after < high - 200


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/jobs/mine", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/jobs/mine",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_free_memory_is_that_of_the_narrowest_control_group(line, folder, names, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "cgroup")
    system = available_mib()
    (tmp_path / "cgroup").write_text(f"7:freezer:/\n{line}\n")
    limit, use, cache = names
    inner = tmp_path / folder / "jobs" / "mine"
    inner.mkdir(parents=True)
    for group, most, used, cached in ((inner.parent, 9, 2, 0), (inner, 5, 3, 1)):
        (group / limit).write_text(f"{most * 2**20}\n")
        (group / use).write_text(f"{used * 2**20}\n")
        (group / "memory.stat").write_text(f"anon 1\n{cache} {cached * 2**20}\n")
    assert available_mib() == 3  # pages of files are given back
    (inner / limit).write_text("max\n")
    assert available_mib() == 7
    (inner.parent / limit).write_text("max\n")
    assert available_mib() == pytest.approx(system, rel=0.2) or system != system


def test_the_fusion_weights_are_kept_and_shown(tmp_path):
    run = exitkit.train({"method": "metagf", "epochs": 1, **FEW}, tmp_path)
    (table,) = run.learned()
    assert table["columns"] == [f"exit {k}" for k in range(1, 5)] and len(table["rows"]) == len(table["values"])
    owned = {
        row: [value is not None for value in values] for row, values in zip(table["rows"], table["values"], strict=True)
    }
    assert owned["stages.0.0.scales.0.0"] == [True] * 4 and sum(owned["stages.2.0.same.1.0.0"]) == 2
    for values in table["values"]:
        assert abs(sum(value for value in values if value is not None) - 1) < 1e-5
    shown = CliRunner().invoke(cli, ["show", str(run.path)])
    assert shown.exit_code == 0 and "fusion weights, layer by layer" in shown.output
    assert "stages.2.0.same.1.0.0" in shown.output
    plain = exitkit.train({"method": "joint", "epochs": 1, **FEW}, tmp_path)
    assert plain.learned() == []
    cost = plain.training_cost()
    assert cost["seconds"] > 0 and cost["memory_mib"] > 100
