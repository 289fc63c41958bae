"""torchvision: imported in one place, only where it is needed, and mended where its library does not fit torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import exitkit
from exitkit.data import torchvision_import
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError

ROOT = Path(exitkit.__file__).parent.parent


def python(code):
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_one_file_alone_imports_it():
    found = [
        path.name
        for folder in ("exitkit", "methods", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) torchvision\b|import_module\(.torchvision", path.read_text(), re.MULTILINE)
    ]
    assert found == ["torchvision_import.py"]


def test_digits_need_none_of_it():
    python(
        "import sys, torch\n"
        "import exitkit.data.vision, exitkit.data.folder\n"
        "from exitkit.data.digits import Digits\n"
        "data = Digits().load(None)\n"
        "next(data.batches('train', [torch.arange(8)], augment=True, seed=0))\n"
        "assert not [name for name in sys.modules if name.startswith('torchvision')]\n"
    )


def test_it_works_whole_or_mended_and_says_so_once_at_most():
    done = python(
        "import torch\n"
        "from exitkit.data.torchvision_import import torchvision\n"
        "v2, models = torchvision('transforms.v2'), torchvision('models')\n"
        "assert torchvision('datasets').CIFAR10 and torchvision().__version__\n"
        "assert v2.RandomResizedCrop(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)\n"
        "assert models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)\n"
        "from torchvision.models.feature_extraction import create_feature_extractor\n"
        "create_feature_extractor(models.resnet18(), ['layer1'])\n"
    )
    assert len(done.stderr.splitlines()) == done.stderr.count("does not fit this torch") <= 1


def test_a_torchvision_whose_library_is_lacking_is_mended():
    # Whatever is installed here: a stand-in that, as the real one, adds rules to operators that nobody has defined.
    stand_in = (
        "import torch\n"
        "from . import half\n"
        "torch.library.register_fake('torchvision::nms')(lambda dets, scores, iou_threshold: scores)\n"
        "torch.library.register_fake('torchvision::qnms')(lambda dets, scores, iou_threshold: scores)\n"
        "from . import datasets\n"
    )
    python(
        "import pathlib, sys, tempfile, warnings\n"
        "folder = pathlib.Path(tempfile.mkdtemp()) / 'torchvision'\n"
        "folder.mkdir()\n"
        f"(folder / '__init__.py').write_text({stand_in!r})\n"
        "(folder / 'half.py').write_text('')\n"
        "(folder / 'datasets.py').write_text('answer = 42')\n"
        "sys.path.insert(0, str(folder.parent))\n"
        "from exitkit.data.torchvision_import import torchvision\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    assert torchvision('datasets').answer == 42\n"
        "    assert torchvision('half').__name__ == 'torchvision.half'\n"
        "assert len(said) == 1 and 'does not fit this torch' in str(said[0].message)\n"
        "import torch\n"
        "assert torch.ops.torchvision.nms.default._schema.name == 'torchvision::nms'\n"
    )


@pytest.mark.parametrize("submodule", ["", "datasets"])
def test_without_it_there_is_one_clear_line(monkeypatch, submodule):
    torchvision_import.torchvision.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r"torchvision does not import .*; install the release that fits") as caught:
        torchvision(submodule)
    assert "\n" not in str(caught.value)
