"""Small networks in the authors' layout, with their names for modules, written from the papers' equations alone."""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d


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
    """Sub-networks of two and three blocks, 8 and 4 new channels a layer; the second fuses two, and exits once."""

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


class InternalClassifier(nn.Module):
    """Reads a map of `size` pixels: mixed pooling to 4x4, or none where the map is smaller."""

    def __init__(self, width, size, classes=5):
        super().__init__()
        self.kernel = size // 4
        if self.kernel:
            self.alpha = nn.Parameter(torch.rand(1))
        grid = size // self.kernel if self.kernel else size
        self.linear = nn.Linear(width * grid * grid, classes)

    def forward(self, x):
        if self.kernel:
            x = self.alpha * max_pool2d(x, self.kernel) + (1 - self.alpha) * avg_pool2d(x, self.kernel)
        return self.linear(x.flatten(1))


class Unit(nn.Module):
    """A unit with its `layers` and, where an exit stands, its `output`."""

    def __init__(self, layers, output=None):
        super().__init__()
        self.layers = layers
        if output:
            self.output = InternalClassifier(*output)

    def forward(self, x):
        """The released VGG, WideResNet and MobileNet: (onward, what the classifier reads)."""
        paths = [self.layers] if isinstance(self.layers, nn.Sequential) else self.layers
        out = sum(path(x) for path in paths)
        return out, out


class ResidualUnit(Unit):
    def forward(self, x):
        total = self.layers[0](x) + self.layers[1](x)
        return total.relu(), total


class ShallowDeep(nn.Module):
    def __init__(self, init_conv, units, end):
        super().__init__()
        self.init_conv = init_conv
        self.layers = nn.ModuleList(units)
        self.end_layers = nn.Sequential(*end)

    def forward(self, x):
        x, outputs = self.init_conv(x), []
        for unit in self.layers:
            x, view = unit(x)
            if hasattr(unit, "output"):
                outputs.append(unit.output(view))
        return [*outputs, self.end_layers(x)]


def sdn_vgg():
    """Five units at 16x16, pooled behind 1, 2, 3; exits behind 0 (16x16), 2 (pooled to 4x4), 3 (pooled to 2x2)."""
    rows = [(3, 4, False, (4, 16)), (4, 4, True, None), (4, 6, True, (6, 4)), (6, 6, True, (6, 2)), (6, 8, False, None)]
    units = [
        Unit(nn.Sequential(*cbr(wide, out, 3, bias=True), *([nn.MaxPool2d(2)] if pool else [])), output)
        for wide, out, pool, output in rows
    ]
    units.append(Unit(nn.Sequential(nn.Flatten(), nn.Linear(8 * 2 * 2, 7), nn.ReLU(), nn.Dropout())))
    return ShallowDeep(nn.Sequential(), units, [nn.Linear(7, 6), nn.Dropout(), nn.Linear(6, 5)])


def sdn_resnet():
    """Two blocks of width 4, one of 8, one of 16, at 32x32; exits behind 0 and 2."""

    def block(wide, out, stride, output=None):
        path = nn.Sequential(*cbr(wide, out, 3, stride), *cbr(out, out, 3)[:2])
        shortcut = nn.Sequential(*cbr(wide, out, 1, stride)[:2]) if stride > 1 else nn.Sequential()
        return ResidualUnit(nn.ModuleList([path, shortcut]), output)

    units = [block(4, 4, 1, (4, 32)), block(4, 4, 1), block(4, 8, 2, (8, 16)), block(8, 16, 2)]
    return ShallowDeep(nn.Sequential(*cbr(3, 4, 3)), units, [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 5)])


def sdn_wrn():
    """A block each of width 16, 32, 64 at 32x32; exits behind 0 and 1."""

    def block(wide, out, stride, output=None):
        first = [nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, out, 3, padding=1), nn.Dropout(0.3)]
        second = [nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 3, stride, 1)]
        shortcut = nn.Sequential(*[nn.Conv2d(wide, out, 1, stride)] * (stride > 1))
        return Unit(nn.ModuleList([nn.Sequential(*first, *second), shortcut]), output)

    units = [block(16, 16, 1, (16, 32)), block(16, 32, 2, (32, 16)), block(32, 64, 2)]
    end = [nn.BatchNorm2d(64), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 5)]
    return ShallowDeep(nn.Conv2d(3, 16, 3, padding=1), units, end)


def sdn_mobilenet():
    """Separable units of width 8, 16, 16 at 8x8, the last two halving; exits behind 0 and 1."""

    def separable(wide, out, stride, output=None):
        depthwise = [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        return Unit(nn.Sequential(*depthwise, *cbr(wide, out, 1)), output)

    units = [separable(32, 8, 1, (8, 8)), separable(8, 16, 2, (16, 4)), separable(16, 16, 2)]
    return ShallowDeep(nn.Sequential(*cbr(3, 32, 3)), units, [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)])
