"""Accuracy per class, against scikit-learn, and what a network that learned nothing looks like."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score

import exitkit
from exitkit.cli import main
from exitkit.errors import UserError
from exitkit.runs.classes import ClassHits, class_table, read_classes
from exitkit.runs.folder import RunFolder

from toy import FEW


def outputs(seed=0, samples=400, exits=3, classes=5, signal=2.0):
    random = np.random.default_rng(seed)
    labels = random.choice(classes, samples, p=[0.6, 0.2, 0.1, 0.07, 0.03])
    logits = random.normal(size=(samples, exits, classes))
    logits += signal * np.eye(classes)[labels][:, None] * np.linspace(0, 1, exits)[:, None]
    return logits, labels


def test_recall_and_balanced_accuracy_are_scikit_learns():
    logits, labels = outputs()
    counted = ClassHits.count(logits, labels)
    for index in range(3):
        predicted = logits[:, index].argmax(1)
        assert counted.balanced[index] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
        np.testing.assert_allclose(counted.recall[index], 100 * recall_score(labels, predicted, average=None))
    assert counted.images.tolist() == np.bincount(labels).tolist()
    assert counted.most_frequent == 0
    assert counted.majority == pytest.approx(100 * (labels == 0).mean())
    assert counted.chance == 20


def test_a_class_without_images_counts_neither_for_the_mean_nor_for_chance():
    logits, labels = outputs()
    counted = ClassHits.count(np.pad(logits, ((0, 0), (0, 0), (0, 2)), constant_values=-99.0), labels)
    np.testing.assert_allclose(counted.balanced, ClassHits.count(logits, labels).balanced)
    assert counted.chance == 20 and np.isnan(counted.recall[:, 5:]).all()


def test_a_network_that_learned_nothing_is_told_from_one_that_did():
    """However high its accuracy: always answering the most frequent class is right for most images."""
    logits, labels = outputs()
    assert ClassHits.count(logits, labels).learned.tolist() == [False, True, True]
    logits[...] = 0
    logits[:, :, 0] = 1
    constant = ClassHits.count(logits, labels)
    assert constant.balanced.tolist() == [20.0] * 3
    assert not constant.learned.any()


def test_guesses_are_rarely_said_to_have_learned():
    random = np.random.default_rng(1)
    said = [ClassHits.count(random.normal(size=(200, 1, 4)), random.integers(0, 4, 200)).learned[0] for _ in range(400)]
    assert np.mean(said) < 0.05


def test_the_stored_table_is_read_as_it_was_written(tmp_path):
    counted = ClassHits.count(*outputs())
    class_table({"validation": counted, "test": counted}).to_csv(tmp_path / "classes.csv", index=False)
    stored = read_classes(tmp_path / "classes.csv", "test", 3)
    assert stored.images.tolist() == counted.images.tolist() and stored.hits.tolist() == counted.hits.tolist()
    text = (tmp_path / "classes.csv").read_text()
    for spoilt in (text.replace("test,1", "test,7"), text.replace("test,0,", "test,0,-"), text.replace("test", "text")):
        (tmp_path / "classes.csv").write_text(spoilt)
        with pytest.raises(UserError, match=r"classes\.csv is damaged"):
            read_classes(tmp_path / "classes.csv", "test", 3)


def test_show_prints_what_accuracies_are_to_be_compared_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    runs = [exitkit.train(FEW | {"epochs": 1, "seed": seed, "lr": 1e-6}, tmp_path).path for seed in (0, 1)]

    def show(*words):
        with pytest.raises(SystemExit) as end:
            main(["show", *map(str, words)])
        assert end.value.code == 0
        return capsys.readouterr()

    outputs = RunFolder(runs[0]).outputs("test")
    expected = ClassHits.count(outputs["logits"], outputs["labels"])
    facts = json.loads(show(runs[0], "--json", "--classes").out)
    assert [row["balanced_accuracy"] for row in facts["exits"]] == pytest.approx(expected.balanced.tolist())
    assert facts["most_frequent_class"] == {"name": "1", "accuracy": pytest.approx(expected.majority)}
    assert [row["class"] for row in facts["classes"]] == [str(digit) for digit in range(10)]
    assert facts["classes"][4]["recall"] == pytest.approx(expected.recall[:, 4].tolist())
    shown = show(runs[0], "--classes").out
    assert "always answering 1: test 10.20 %, balanced 10.00 %" in shown
    assert "no better than chance (balanced accuracy)" in shown and "recall on test (%)" in shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    (tmp_path / "notes.txt").touch()
    both = show(*runs, tmp_path / "notes.txt")
    assert all(run.name in both.out for run in runs)
    assert both.err == f"skipped {tmp_path / 'notes.txt'}: not a run folder\n"
    assert [row["name"] for row in json.loads(show(*runs, "--json").out)] == [run.name for run in runs]
    (runs[0] / "classes.csv").unlink()  # as in runs of earlier releases
    assert json.loads(show(runs[0], "--json", "--classes").out) == facts
