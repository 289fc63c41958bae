"""Small networks in the authors' layout, with their names for modules, written from the papers' equations alone."""

import torch
from torch import nn
from torch.nn.functional import interpolate


def cbr(wide, out, kernel, stride=1, bias=False):
    return [nn.Conv2d(wide, out, kernel, stride, kernel // 2, bias=bias), nn.BatchNorm2d(out), nn.ReLU()]


class Net(nn.Module):
    """A unit: one list `net`."""

    def __init__(self, layers):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


def unit(wide, out, factor, stride=1):
    if factor is None:
        return Net(cbr(wide, out, 3, stride))
    inner = min(wide, factor * out)
    return Net(cbr(wide, inner, 1) + cbr(inner, out, 3, stride))


def first(width, large):
    """The large stem alone has no `net`."""
    return nn.Sequential(*cbr(3, width, 7, 2, bias=True), nn.MaxPool2d(3, 2, 1)) if large else Net(cbr(3, width, 3))


class Classifier(nn.Module):
    def __init__(self, width, classes, inner):
        super().__init__()
        self.m = nn.Sequential(Net(cbr(width, inner, 3, 2)), Net(cbr(inner, inner, 3, 2)), nn.AvgPool2d(2))
        self.linear = nn.Linear(inner, classes)

    def forward(self, x):
        return self.linear(self.m(x).flatten(1))


class MultiScaleFirst(nn.Module):
    def __init__(self, large):
        super().__init__()
        self.layers = nn.ModuleList([first(4, large), Net(cbr(4, 8, 3, 2)), Net(cbr(8, 16, 3, 2))])

    def forward(self, x):
        fine = self.layers[0](x)
        middle = self.layers[1](fine)
        return [fine, middle, self.layers[2](middle)]


class MultiScaleLayer(nn.Module):
    """Units (wide, out, factor) a surviving scale: of the scale itself, and of the finer one or None."""

    def __init__(self, *scales):
        super().__init__()
        self.layers = nn.ModuleList()
        for normal, down in scales:
            scale = nn.Module()
            scale.conv_normal = unit(*normal)
            if down:
                scale.conv_down = unit(*down, stride=2)
            self.layers.append(scale)

    def forward(self, x):
        outputs = []
        for offset, scale in enumerate(self.layers, len(x) - len(self.layers)):
            down = [scale.conv_down(x[offset - 1])] if hasattr(scale, "conv_down") else []
            outputs.append(torch.cat([x[offset], *down, scale.conv_normal(x[offset])], 1))
        return outputs


class Narrowing(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.m = nn.ModuleList([Net(cbr(wide, narrow, 1)) for wide, narrow in widths])

    def forward(self, x):
        return [unit(tensor) for unit, tensor in zip(self.m, x, strict=True)]


class MSDNet(nn.Module):
    """Three exits behind layers 2, 3, 4 of width units 4, 6, 8, 10 -> 5, 7 and scales 1-2-4; layer 3 drops one."""

    def __init__(self, classes=5, large=False, bottleneck=True):
        super().__init__()
        one, two, four = (1, 2, 4) if bottleneck else (None,) * 3
        full = [
            MultiScaleLayer(((w, 2, one), None), ((2 * w, 2, two), (w, 2, one)), ((4 * w, 4, four), (2 * w, 4, two)))
            for w in (4, 6)
        ]
        dropping = MultiScaleLayer(((16, 2, two), (8, 2, one)), ((32, 4, four), (16, 4, two)))
        final = MultiScaleLayer(((10, 4, two), None), ((20, 4, four), (10, 4, two)))
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(MultiScaleFirst(large), *full),
                nn.Sequential(dropping, Narrowing((20, 10), (40, 20))),
                nn.Sequential(final),
            ]
        )
        inner = (32, 20, 28) if large else (128,) * 3
        widths = zip((32, 20, 28), inner, strict=True)
        self.classifier = nn.ModuleList([Classifier(width, classes, each) for width, each in widths])

    def forward(self, x):
        outputs = []
        for block, classifier in zip(self.blocks, self.classifier, strict=True):
            x = block(x)
            outputs.append(classifier(x[-1]))
        return outputs


class RanetBlock(nn.Module):
    """Two layers; `low`: widths of the lower sub-network's dense features and its bottleneck factor."""

    def __init__(self, wide, growth, factor, low=None, down=False, trans=None):
        super().__init__()
        lower = growth // 4 if low else 0
        self.layers = nn.ModuleList()
        for t in range(2):
            layer = nn.Module()
            stride = 2 if down and t == 1 else 1
            layer.conv_normal = unit(wide + t * growth, growth - lower, factor, stride)
            if low:
                layer.conv_up = unit(low[0][t], lower, low[1])
            self.layers.append(layer)
        if low:
            self.conv_last = Net(cbr(low[0][2], (wide + 2 * growth) // 4, 1))
        if trans:
            self.trans = Net(cbr(*trans, 1))

    def forward(self, x, low):
        def resize(x, like):
            return interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)

        dense = [x]
        for t, layer in enumerate(self.layers):
            new = layer.conv_normal(x)
            up = [resize(layer.conv_up(low[t]), new)] if low else []
            x = torch.cat([resize(x, new), *up, new], 1)
            dense.append(x)
        if low:
            x = torch.cat([x, resize(self.conv_last(low[2]), x)], 1)
        return (self.trans(x) if hasattr(self, "trans") else x), dense


class RANet(nn.Module):
    """Two sub-networks of two and three blocks, of 8 and 4 new channels a layer; the second fuses two and exits once.

    At a small stem of width unit 4; each block has two layers.
    """

    def __init__(self, classes=5, large=False):
        super().__init__()
        self.FirstLayer = nn.Module()
        self.FirstLayer.layers = nn.ModuleList([first(4, large), Net(cbr(4, 8, 3, 2))])
        low = nn.ModuleList([RanetBlock(8, 8, 2), RanetBlock(24, 8, 2)])
        high = [
            RanetBlock(4, 4, 1, low=((8, 16, 24), 2), trans=(15, 7)),
            RanetBlock(7, 4, 1, low=((24, 32, 40), 2), down=True),
            RanetBlock(18, 4, 1),
        ]
        self.scale_flows = nn.ModuleList([low, nn.ModuleList(high)])
        widths = (24, 40, 26)
        self.classifier = nn.ModuleList([Classifier(width, classes, width if large else 128) for width in widths])

    def forward(self, x):
        fine = self.FirstLayer.layers[0](x)
        coarse = self.FirstLayer.layers[1](fine)
        first, below_first = self.scale_flows[0][0](coarse, None)
        second, below_second = self.scale_flows[0][1](first, None)
        x, _ = self.scale_flows[1][0](fine, below_first)
        x, _ = self.scale_flows[1][1](x, below_second)
        third, _ = self.scale_flows[1][2](x, None)
        return [head(view) for head, view in zip(self.classifier, (first, second, third), strict=True)]
