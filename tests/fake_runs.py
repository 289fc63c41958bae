"""Finished runs without training, for the tests of reports."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

MACS = (123_456, 251_000, 322_100, 401_777)


class FakeRun:
    """A finished run whose outputs are drawn at random, better from exit to exit."""

    def __init__(self, label, seed, backbone="tiny_net", dataset="digits", macs=MACS, n=300, **identity):
        self.label, self.macs = label, macs
        self.path = Path("runs") / f"{label}-{seed}"
        self.recipe = SimpleNamespace(
            method=label, backbone=backbone, dataset=dataset, seed=seed, epochs=3, batch_size=64
        )
        same = {"method": json.dumps(label), "backbone": json.dumps(backbone), "dataset": json.dumps(dataset)}
        self.identity_given = identity
        self.identity = {**same, "seed": str(seed), "epochs": "3", **identity}
        self.parts = {}
        for part, samples in (("validation", 200), ("test", n)):
            rng = np.random.default_rng([seed, samples, len(label)])
            labels = rng.integers(0, 10, samples)
            signal = np.eye(10)[labels][:, None] * np.linspace(2.5, 4, len(macs))[:, None]
            logits = (rng.normal(size=(samples, len(macs), 10)) + signal).astype(np.float32)
            self.parts[part] = {"logits": logits, "labels": labels, "indices": np.arange(samples)}

    def outputs(self, part):
        return self.parts[part]

    def results(self):
        """Return the accuracy of each exit, in percent."""
        hits = {part: out["logits"].argmax(2) == out["labels"][:, None] for part, out in self.parts.items()}
        return {part: (100 * right.mean(axis=0)).tolist() for part, right in hits.items()}

    def environment(self):
        return {
            "exitkit": "0.1",
            "torch": "2.13",
            "device": "cpu",
            "gpu": None,
            "started": f"2026-0{1 + self.recipe.seed}-01",
        }

    def probes(self):
        return {}

    def training_images(self):
        return 1_234

    def class_names(self):
        return [f"class {label}" for label in range(10)]

    def training_cost(self):
        return {"seconds": 10.0 * len(self.label) + self.recipe.seed, "memory_mib": 100.0 + len(self.label)}

    def costs(self):
        return [{"exit": k, "papers": m + 10, "macs": m, "params": 7 * k} for k, m in enumerate(self.macs, 1)]


def runs(methods=("joint", "ge", "boost_net"), seeds=2, **kwargs):
    return [FakeRun(method, seed, **kwargs) for seed in range(seeds) for method in methods]
