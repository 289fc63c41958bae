"""A bundle of two tiny stages, written at once: a bright image leaves at the first exit, a dark one at the second."""

import json
import math

import numpy as np
import onnx
from onnx import TensorProto, helper

from exitkit.inference.export import bundle

SHAPE = (1, 4, 4)
NAMES = ["ant", "bee", "cow"]
MEAN, STD = 0.5, 0.25


def stage(path, weights, index, last):
    """Write a program that flattens its input, multiplies it, and hands it on."""
    given = "images" if index == 1 else f"state_{index}_0"
    nodes = [helper.make_node("Flatten", [given], ["flat"], axis=1)]
    nodes += [helper.make_node("MatMul", ["flat", "weights"], [f"logits_{index}"])]
    outputs = [helper.make_tensor_value_info(f"logits_{index}", TensorProto.FLOAT, ["batch", len(NAMES)])]
    if not last:
        nodes += [helper.make_node("Identity", [given], [f"state_{index + 1}_0"])]
        outputs += [helper.make_tensor_value_info(f"state_{index + 1}_0", TensorProto.FLOAT, ["batch", *SHAPE])]
    inputs = [helper.make_tensor_value_info(given, TensorProto.FLOAT, ["batch", *SHAPE])]
    values = [onnx.numpy_helper.from_array(weights.astype(np.float32), "weights")]
    graph = helper.make_graph(nodes, f"stage-{index}", inputs, outputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def tiny_bundle(folder, images=64):
    """Write the bundle to a new folder, and return the folder."""
    folder.mkdir()
    weights = np.zeros((16, 3))
    weights[:, 0] = 0.3  # the confidence of the first exit grows with the brightness
    stage(folder / "stage-1.onnx", weights, 1, last=False)
    stage(folder / "stage-2.onnx", np.random.default_rng(1).normal(size=(16, 3)), 2, last=True)
    rules = {"cheap": 0.5, "default": 0.8, "100%": math.inf}
    policies = {
        name: {"score": "confidence", "thresholds": [str(limit), "-inf"], "temperatures": None}
        for name, limit in rules.items()
    }
    shares = {"cheap": [0.7, 0.3], "default": [0.5, 0.5], "100%": [0.0, 1.0]}
    points = [
        {"name": name, "cost": 1 + shares[name][1], "shares": shares[name], "images": 100, "policy": policy}
        for name, policy in policies.items()
    ]
    facts = {
        "programs": ["stage-1.onnx", "stage-2.onnx"],
        "input_shape": list(SHAPE),
        "mean": [MEAN],
        "std": [STD],
        "preprocessing": {"colour": "L", "resize": 4, "interpolation": "bilinear", "crop": [4, 4]},
        "class_names": NAMES,
        "run": "tiny",
        "points": points,
    }
    (folder / "policy.json").write_text(json.dumps(policies["default"] | facts))
    normalised = (pixels(images) / 255 - MEAN) / STD
    bundle.complete(folder, normalised.astype(np.float32))
    return folder


def pixels(count, seed=0):
    """Return images of all brightnesses, uint8 [N, 1, 4, 4]."""
    generator = np.random.default_rng(seed)
    brightness = generator.integers(0, 230, (count, 1, 1, 1))
    return (brightness + generator.integers(0, 26, (count, *SHAPE))).astype(np.uint8)
