"""The load on a service is what was asked for, and the answers are counted."""

import numpy as np
import pytest
from click.testing import CliRunner

from exitkit.benchmarks.timing import load

from bundles import pixels, tiny_bundle


def test_rates_are_kept_and_ways_to_serve_differ_in_their_exits(tmp_path):
    folder = tiny_bundle(tmp_path / "tiny")
    np.save(tmp_path / "images.npy", pixels(40))
    bodies = load.read_bodies(folder, tmp_path / "images.npy")
    ways = {"all exits": ["--threads", "1", "--point", "100%"], "early exit": ["--threads", "1"]}
    rows = load.measure(folder, bodies, ways, [20.0], 2.0)
    assert [row["way"] for row in rows] == ["all exits", "early exit"]
    assert rows[0]["exit"] == 2 and 1 < rows[1]["exit"] < 2
    for row in rows:
        assert 0 < row["served"] < 40 and row["refused"] == 0 and 0 < row["p50"] <= row["p95"] <= row["p99"]


@pytest.mark.parametrize("words", [["nowhere"], [".", "nothing.npy"], [".", "--rate", "-1"], [".", "--seconds", "0"]])
def test_mistakes_are_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(load.main, words)
    assert done.exit_code == 2 and done.output.startswith("exitkit: ") and len(done.output.splitlines()) == 1


def test_a_service_that_does_not_start_says_why(tmp_path):
    folder = tiny_bundle(tmp_path / "tiny")
    (folder / "stage-2.onnx").unlink()
    done = CliRunner().invoke(load.main, [str(folder)])
    assert done.exit_code == 2 and "the service does not start: run.py: " in done.output
