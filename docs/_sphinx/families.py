"""Attaches exits to one network of every family of a library: `python docs/_sphinx/families.py timm [NAME ...]`.

Writes families.json beside this file, one row per network, which the tables of docs/backbones/families.md show. The
networks have random weights, and see the smallest images that they accept. Exits are placed at 33 % and 66 % of the
cost. Checked for each: the last exit equals the network bit for bit, in evaluation and in training with the same random
numbers; two steps of joint training, GE and BoostNet change every stage and head; every exit costs more than
the one before; every stage with its head is exported to ONNX, and the program does what the stage does.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import exitkit
from exitkit.data.torchvision_import import torchvision
from exitkit.inference.export.export import TOLERANCE
from exitkit.inference.export.programs import pieces
from exitkit.inference.export.runner import load as load_program
from exitkit.networks import MultiExitNetwork
from exitkit.networks.attach.blocks import find_blocks
from exitkit.networks.attach.libraries import library

RESULTS = Path(__file__).with_name("families.json")
FRACTIONS = (0.33, 0.66)
CLASSES = 7
CHECKS = ("evaluation", "training", "joint", "ge", "boostnet", "cost", "onnx")

TIMM = (
    "beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 "
    "test_convnext convnextv2_atto cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny "
    "deepseek_vit_412m deit_tiny_patch16_224 deit3_small_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small "
    "efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 "
    "efficientvit_m0 vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf "
    "gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny "
    "hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small "
    "levit_128s lowformer_b0 test_mambaout coatnet_nano_rw_224 maxvit_tiny_rw_224 poolformerv2_s12 caformer_s18 "
    "gmlp_ti16_224 mixer_s32_224 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv5_base mobilevit_xxs "
    "mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 "
    "pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvit_m1 res2next50 "
    "resnest14d resnet18 resnext50_32x4d resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 "
    "skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 "
    "tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 "
    "vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 "
    "ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224"
)
"""One of the smallest networks of each file of timm's models, and a few more of files with several families."""

_SHALLOW = {"depth": 4}
_NARROW = {"depth": 4, "embed_dim": 96, "num_heads": 3}
_FEW = {"depths": (1, 1, 2, 1)}
SMALLER: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _NARROW,
    "cait_xxs24_224": {"depth": 6, "depth_token_only": 1},
    "coat_tiny": {"parallel_depth": 2},
    "coatnet_nano_rw_224": _FEW,
    "convit_tiny": _SHALLOW,
    "convnextv2_atto": {"depths": (1, 1, 3, 1)},
    "davit_tiny": _FEW,
    "deepseek_vit_412m": _SHALLOW,
    "deit_tiny_patch16_224": _SHALLOW,
    "deit3_small_patch16_224": _SHALLOW,
    "densenet121": {"block_config": (3, 4, 6, 4)},
    "eva02_tiny_patch14_224": _SHALLOW,
    "gemma4_vit_167m": _SHALLOW,
    "maxvit_tiny_rw_224": _FEW,
    "naflexvit_base_patch16_parfac_gap": _NARROW,
    "pvt_v2_b0": _FEW,
    "qwen3_vit_88m": _SHALLOW,
    "samvit_base_patch16_224": _NARROW,
    "sequencer2d_s": {"layers": [2, 2, 2, 2]},
    "swin_tiny_patch4_window7_224": _FEW,
    "swinv2_cr_tiny_224": _FEW,
    "swinv2_tiny_window8_256": _FEW,
    "tnt_s_legacy_patch16_224": _SHALLOW,
    "twins_svt_small": {"depths": [1, 1, 4, 2]},
    "vit_relpos_small_patch16_224": _NARROW,
    "vit_tiny_patch16_224": _SHALLOW,
    "vit_tiny_patch16_dinov3_qkvb": _SHALLOW,
    "vit_tiny_r_s16_p8_224": _SHALLOW,
    "xcit_nano_12_p8_224": _SHALLOW,
}
"""Arguments for fewer or narrower blocks than published, so that the checks take less time."""

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"
)

_TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4}
_MAPS = {"hidden_sizes": [16, 16], "depths": [4, 4]}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "vit": _TOKENS,
    "deit": {**_TOKENS, "architectures": ["DeiTForImageClassification"]},
    "dinov2": _TOKENS,
    "dinov2_with_registers": _TOKENS,
    "beit": _TOKENS,
    "data2vec-vision": _TOKENS,
    "vit_msn": _TOKENS,
    "ijepa": _TOKENS,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "convnext": {**_MAPS, "num_stages": 2, "patch_size": 2},
    "convnextv2": {**_MAPS, "num_stages": 2, "patch_size": 2},
    "resnet": {**_MAPS, "embedding_size": 16, "layer_type": "basic"},
    "regnet": {**_MAPS, "embedding_size": 16, "groups_width": 8},
    "bit": {"hidden_sizes": [64, 64], "depths": [4, 4], "embedding_size": 16, "num_groups": 4},
    "poolformer": {"hidden_sizes": [16, 32, 32, 32], "depths": [2, 2, 2, 2]},
    "pvt_v2": {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 1, 2, 2]},
    "mobilenet_v2": {"depth_multiplier": 0.35},
}
"""Tiny configurations by model type."""


class Subject(NamedTuple):
    """A network, and how exits are attached to it.

    Attributes:
        family: file of its library, or model type.
        model: the network.
        side: height and width of the images.
        attach: the network -> the cascade.
    """

    family: str
    model: nn.Module
    side: int
    attach: Callable[[nn.Module], MultiExitNetwork]


def from_timm(name: str) -> Subject:
    """Return a network of timm, with stochastic depth where it has any, for the smallest images that it accepts."""
    timm = library("timm")
    described = timm.models.get_pretrained_cfg(name)
    sides = sorted({64, 96, 128, 160, 192, 224, described.input_size[-1]})
    for side in sides:
        size = {"img_size": side} if described.fixed_input_size else {}
        for regular in ({"drop_path_rate": 0.1}, {}):
            try:
                model = timm.create_model(name, num_classes=CLASSES, **size, **regular, **SMALLER.get(name, {}))
                if _accepts(model, side):
                    module = type(model).__module__.rpartition(".")[2]
                    return Subject(module, model, side, _by_cost(side, "auto"))
            except (TypeError, AssertionError, ValueError, RuntimeError):
                continue
    raise ValueError(f"{name} accepts images of none of {sides}")


def from_torchvision(name: str) -> Subject:
    """Return a network of torchvision for the smallest images that it accepts."""
    arguments: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": False}
    for side in (64, 96, 128, 224, 299):
        if name.startswith("vit"):
            arguments["image_size"] = side
        if name.startswith("maxvit"):
            arguments["input_size"] = (side, side)
        with warnings.catch_warnings(action="ignore"):
            try:
                model = torchvision("models").get_model(name, **arguments)
            except ValueError:
                continue
        if _accepts(model, side):
            return Subject(name.rstrip("0123456789_"), model, side, _by_cost(side, "linear"))
    raise ValueError(f"{name} accepts no images")


def from_transformers(name: str) -> Subject:
    """Return a tiny network of transformers, which is cut between its blocks."""
    transformers = library("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(name, num_labels=CLASSES, **TRANSFORMERS[name])
    model = transformers.AutoModelForImageClassification.from_config(config)
    side = next(side for side in (32, 64, 224) if _accepts(model, side))

    def attach(model: nn.Module) -> MultiExitNetwork:
        shape = (3, side, side)
        blocks = find_blocks(model)
        return exitkit.attach_exits(
            model, fractions=FRACTIONS, blocks=blocks, input_shape=shape, head="auto", check=False
        )

    return Subject(name, model, side, attach)


def _by_cost(side: int, head: Any) -> Callable[[nn.Module], MultiExitNetwork]:
    shape = (3, side, side)
    return lambda model: exitkit.attach_exits(model, fractions=FRACTIONS, input_shape=shape, head=head, check=False)


def _accepts(model: nn.Module, side: int) -> bool:
    """Whether a network accepts two images of a size, in both modes."""
    try:
        for training in (False, True):
            with torch.no_grad():
                copy.deepcopy(model).train(training)(torch.rand(2, 3, side, side))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    return True


LIBRARIES: dict[str, tuple[Iterable[str], Callable[[str], Subject]]] = {
    "timm": (TIMM.split(), from_timm),
    "transformers": (TRANSFORMERS, from_transformers),
    "torchvision": (TORCHVISION.split(), from_torchvision),
}


def check(library_name: str, name: str) -> dict[str, Any]:
    """Return the row of a network: what it is, where its exits are, and the result of each check, "" or a reason."""
    torch.manual_seed(0)
    subject = LIBRARIES[library_name][1](name)
    row: dict[str, Any] = {"family": subject.family, "network": name, "side": subject.side}
    with warnings.catch_warnings(action="ignore"):
        try:
            network = subject.attach(subject.model)
        except exitkit.UserError as error:
            return row | {"refused": re.sub(r"\S*/site-packages/", "", str(error))}
        costs = [exit.macs for exit in exitkit.cost(network)]
        row["shares"] = [round(macs / costs[-1], 2) for macs in costs[:-1]]
        if max(abs(got - asked) for got, asked in zip(row["shares"], FRACTIONS, strict=True)) > 0.2:
            return row | {"refused": f"no point near {FRACTIONS}; the nearest are at {row['shares']}"}
        images = torch.randn(2, 3, subject.side, subject.side)
        results = {
            "evaluation": equal(subject.model, network, images, training=False),
            "training": equal(subject.model, network, images, training=True),
            "cost": "" if costs == sorted(set(costs)) else f"{costs}",
            "onnx": exported(network, images),
            **{method: stepped(network, method, images) for method in ("joint", "ge", "boostnet")},
        }
    return row | {"results": {key: results[key] for key in CHECKS}}


def equal(model: nn.Module, network: MultiExitNetwork, images: Tensor, training: bool) -> str:
    """Compare the last exit with the network itself, for the same random numbers."""
    model.train(training)
    network.train(training)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        got = network(images).logits[-1]
    expected = getattr(expected, "logits", expected)
    return "" if torch.equal(got, expected) else f"differs by {(got - expected).abs().max():.2g}"


def stepped(network: MultiExitNetwork, method: str, images: Tensor) -> str:
    """Train a copy for two steps."""
    network = copy.deepcopy(network).train()
    names = {part: name for name, part in network.named_modules()}
    strategy = exitkit.build_strategy(method)
    run = exitkit.Run.local(network, strategy, torch.optim.SGD(network.parameters(), lr=0.01))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters(remove_duplicate=False)}
    labels = torch.arange(len(images)) % CLASSES
    try:
        for _ in range(2):  # in the first step, a last layer of zeros passes no gradient on
            run.train_step((images, labels))
    except (exitkit.UserError, RuntimeError) as error:
        return str(error)
    for part in (*network.stages, *network.heads):
        parameters = dict(part.named_parameters(prefix=names[part]))
        if not all(parameter.isfinite().all() for parameter in parameters.values()):
            return f"{names[part]} is not finite"
        if parameters and all(torch.equal(parameter, before[name]) for name, parameter in parameters.items()):
            return f"{names[part]} does not change"
    return ""


def exported(network: MultiExitNetwork, images: Tensor) -> str:
    """Export every stage with its head to ONNX, and compare the program with the stage."""
    logging.disable(logging.WARNING)
    sizes = {0: torch.export.Dim("batch", min=1)}
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), torch.no_grad():
            for number, piece in enumerate(pieces(network.eval(), images), start=1):
                file = Path(folder) / f"{number}.onnx"
                shapes = ((sizes,) * len(piece.inputs),)
                program = torch.export.export(piece.module, piece.inputs, dynamic_shapes=shapes)
                torch.onnx.export(program, f=file, dynamo=True, external_data=False, verbose=False)
                expected = piece.module(*piece.inputs)[0].numpy()
                got = load_program(file)([tensor.numpy() for tensor in piece.inputs])[0]
                if not abs(got - expected).max() <= TOLERANCE * abs(expected).max():
                    return f"stage {number} differs"
    except Exception as error:  # the tracer and the converter raise errors of many types
        cause = re.search(r"Exception summary\s+<class '\w+'>: (.*)", str(error))
        return textwrap.shorten(cause[1] if cause else f"{type(error).__name__}: {error}", 120)
    finally:
        logging.disable(logging.NOTSET)
    return ""


def main(library_name: str, *names: str) -> None:
    """Check networks, by default all of a library, and write the result of each that ends without an error."""
    for name in names or LIBRARIES[library_name][0]:
        began = time.time()
        try:
            row = check(library_name, name)
        except Exception:
            print(f"{name}: {traceback.format_exc()}", flush=True)
            continue
        stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        stored.setdefault(library_name, {})[name] = row
        order = list(LIBRARIES[library_name][0])
        stored[library_name] = dict(sorted(stored[library_name].items(), key=lambda item: order.index(item[0])))
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        failed = row.get("refused") or {key: value for key, value in row["results"].items() if value}
        print(f"{name}: {failed or 'all'} ({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
