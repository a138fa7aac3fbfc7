"""Small networks, one for each hazard, and larger ones for the law.

A specimen takes one tensor of (N, 3, H, W), of at least 9 pixels, odd or even, and gives one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

Forward = Callable[[Any, Any], Any]


class Net(nn.Module):
    """Modules by name, and a function that says what to do with them."""

    def __init__(self, forward: Forward, **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size where its stride is 1."""
    options.setdefault("padding", options.get("dilation", 1) * (kernel - 1) // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def _residual(join: Forward) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        def forward(s: Any, x: Any) -> Any:
            x = F.relu(s.stem(x))
            return F.relu(join(s.bn2(s.conv2(F.relu(s.bn1(s.conv1(x))))), x))

        layers = {"conv1": conv(4, 4), "bn1": nn.BatchNorm2d(4), "conv2": conv(4, 4), "bn2": nn.BatchNorm2d(4)}
        return Net(forward, stem=conv(3, 4), **layers)

    return build


def _plus_equals(out: Any, x: Any) -> Any:
    out += x
    return out


def nested_residual() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = s.stem(x)
        inner = s.a(x)
        return x + s.c(F.relu(inner + s.b(F.relu(inner))))

    return Net(forward, stem=conv(3, 4), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4))


def projection_skip() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        return F.relu(s.bn2(s.conv2(F.relu(s.bn1(s.conv1(x))))) + s.skip_bn(s.skip(x)))

    return Net(
        forward,
        conv1=conv(3, 6, stride=2, bias=False),
        bn1=nn.BatchNorm2d(6),
        conv2=conv(6, 6, bias=False),
        bn2=nn.BatchNorm2d(6),
        skip=conv(3, 6, 1, stride=2, bias=False),
        skip_bn=nn.BatchNorm2d(6),
    )


def option_a_skip() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2), "constant", 0)
        return F.relu(s.bn(s.conv2(F.relu(s.conv1(x)))) + skip)

    return Net(forward, conv1=conv(3, 6, stride=2), conv2=conv(6, 6), bn=nn.BatchNorm2d(6))


def stride() -> nn.Module:
    return nn.Sequential(conv(3, 4, stride=2), nn.ReLU(), conv(4, 5, 5, stride=2, padding=1), nn.ReLU(), conv(5, 4))


def dilation() -> nn.Module:
    return nn.Sequential(conv(3, 4, dilation=2), nn.ReLU(), conv(4, 4, dilation=2), nn.ReLU(), conv(4, 3, dilation=3))


def groups() -> nn.Module:
    """Partitions that nest (6 in 3), and that do not (6 and 4 of 12 channels)."""
    return nn.Sequential(
        conv(3, 12, groups=3), nn.ReLU(), conv(12, 12, groups=6), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 4)
    )


def depthwise() -> nn.Module:
    """A channel multiplier, then a depthwise convolution of its outputs."""
    return nn.Sequential(conv(3, 6, groups=3), nn.ReLU6(), conv(6, 6, groups=6), nn.BatchNorm2d(6), conv(6, 4, 1))


def inverted_residual() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        return x + s.bn3(s.project(s.act(s.bn2(s.spread(s.act(s.bn1(s.expand(x))))))))

    return Net(
        forward,
        expand=conv(3, 9, 1, bias=False),
        bn1=nn.BatchNorm2d(9),
        spread=conv(9, 9, groups=9, bias=False),
        bn2=nn.BatchNorm2d(9),
        project=conv(9, 3, 1, bias=False),
        bn3=nn.BatchNorm2d(3),
        act=nn.ReLU6(),
    )


def zero_pad_module() -> nn.Module:
    """TensorFlow's "same" for an even size: one more pixel at the far end."""
    layers = (nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.ZeroPad2d((2, 1, 0, 3)))
    return nn.Sequential(*layers, nn.Conv2d(4, 4, (2, 4)), nn.ReLU(), conv(4, 3))


def zero_pad_function() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = s.b(F.relu(s.a(F.pad(x, (1, 0, 0, 2)))))
        return F.relu(s.c(F.pad(x, [2, 1, -1, 1])))

    return Net(forward, a=nn.Conv2d(3, 4, 2), b=conv(4, 4), c=nn.Conv2d(4, 4, 3))


def same_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 3), dilation=2, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding="valid"),
    )


def non_square() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, (1, 5), padding=(0, 2)),
        nn.ReLU(),
        nn.Conv2d(4, 4, (3, 1), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        nn.ReLU(),
        nn.Conv2d(4, 4, (2, 4), padding=(1, 0)),
    )


def no_bias() -> nn.Module:
    """Everything behind a 1x1 without bias merges exactly."""
    layers = (conv(3, 5, 1, bias=False), conv(5, 4, bias=False), nn.ReLU(), conv(4, 6, bias=False), conv(6, 4, 1))
    return nn.Sequential(*layers)


def pre_activation() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = s.stem(x)
        return x + s.conv2(F.relu(s.bn2(s.conv1(F.relu(s.bn1(x))))))

    norms = {"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)}
    return Net(forward, stem=conv(3, 4), conv1=conv(4, 4), conv2=conv(4, 4), **norms)


def inplace_module() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU6(inplace=True), conv(4, 4))


def inplace_function() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        return F.hardswish(s.c(F.relu_(s.b(F.silu(s.a(x), inplace=True)))))

    return Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))


def inplace_method() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        return s.c(s.b(s.a(x).relu_()).tanh_())

    return Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))


def overwritten_skip() -> nn.Module:
    """The skip is read after the activation has overwritten it: the sum gets relu(x), not x."""

    def forward(s: Any, x: Any) -> Any:
        x = s.stem(x)
        y = s.b(F.relu(s.a(s.relu(x))))
        return y + x

    return Net(forward, stem=conv(3, 4), relu=nn.ReLU(inplace=True), a=conv(4, 4), b=conv(4, 4))


def activations() -> nn.Module:
    """Module, function and method; with options."""

    def forward(s: Any, x: Any) -> Any:
        x = s.b(F.gelu(s.a(x), approximate="tanh"))
        return s.d(F.leaky_relu(s.c(s.act(x)), 0.2)).sigmoid()

    return Net(forward, a=conv(3, 4), b=conv(4, 4), act=nn.Hardswish(), c=conv(4, 4), d=conv(4, 4))


def shared_module() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.stem(x))
        return s.head(F.relu(s.twice(F.relu(s.twice(x)))))

    return Net(forward, stem=conv(3, 4), twice=conv(4, 4), head=conv(4, 4))


def tied_weights() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.stem(x))
        return s.head(F.relu(s.b(F.relu(s.a(x)))))

    net = Net(forward, stem=conv(3, 4), a=conv(4, 4), b=conv(4, 4), head=conv(4, 4))
    net.b.weight = net.a.weight
    return net


def second_user() -> nn.Module:
    """An inner tensor leaves the chain, through something that cannot be merged."""

    def forward(s: Any, x: Any) -> Any:
        a = s.a(x)
        b = s.b(F.relu(a))
        return s.c(F.relu(b)) * torch.softmax(a, 1)

    return Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))


def concat_branches() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.stem(x))
        branches = (s.one(x), s.three(F.relu(s.reduce(x))), s.pool(x))
        return s.head(F.relu(s.bn(torch.cat(branches, dim=1))))

    layers = {"one": conv(4, 3, 1), "reduce": conv(4, 2, 1), "three": conv(2, 4), "pool": nn.AvgPool2d(3, 1, 1)}
    return Net(forward, stem=conv(3, 4), bn=nn.BatchNorm2d(11), head=conv(11, 4), **layers)


def difference() -> nn.Module:
    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.stem(x))
        return F.relu(x - s.smooth(x))

    return Net(forward, stem=conv(3, 4), smooth=conv(4, 4))


def repvgg_block() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.ReLU(), RepVggBlock(4, 4, 1), RepVggBlock(4, 6, 2))


def dropout() -> nn.Module:
    layers = (conv(3, 4), nn.Dropout2d(0.5), nn.ReLU(), conv(4, 4), nn.Dropout(0.5, inplace=True), nn.BatchNorm2d(4))
    return nn.Sequential(*layers, conv(4, 4, 1))


def one_channel() -> nn.Module:
    return nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 1), nn.BatchNorm2d(1), nn.ReLU(), conv(1, 4))


def average_pool() -> nn.Module:
    pools = (nn.AvgPool2d(2), nn.AvgPool2d((1, 3), (1, 2), (0, 1)))
    return nn.Sequential(conv(3, 4), pools[0], nn.ReLU(), conv(4, 4), pools[1], nn.BatchNorm2d(4), conv(4, 4))


def slices() -> nn.Module:
    """Crops and steps of space, ranges of channels."""

    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.a(x))[:, 1:5, 1:, :-2]
        return s.c(F.relu(s.b(x[:, ::2, ::2, 1::3])))

    return Net(forward, a=conv(3, 6), b=conv(2, 4), c=conv(4, 4))


def one_dimension() -> nn.Module:
    layers = (nn.Conv1d(3, 4, 5, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 4, padding=3, dilation=2))
    return nn.Sequential(*layers, nn.ReLU(), nn.AvgPool1d(2))


def three_dimensions() -> nn.Module:
    layers = (nn.Conv3d(3, 4, (1, 3, 3), 2, (0, 1, 1)), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, (3, 1, 2), padding=1))
    return nn.Sequential(*layers)


def decoder() -> nn.Module:
    """Two levels of a U-Net's decoder, and nearest upsampling in three spellings."""

    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.norm(s.stem(x)))
        y = F.relu(s.a(F.interpolate(x, scale_factor=2, mode="nearest")))
        z = F.relu(s.b(torch.cat((y, s.up(x)), 1)))
        return s.d(F.silu(s.c(F.interpolate(z, scale_factor=(2.0, 1.0), mode="nearest-exact"))))

    layers = {"a": conv(4, 3), "b": conv(7, 4), "c": conv(4, 3, bias=False), "d": conv(3, 3)}
    return Net(forward, stem=conv(3, 4), norm=nn.BatchNorm2d(4), up=nn.Upsample(scale_factor=2), **layers)


def parallel_upsampling() -> nn.Module:
    """A sum and a concat of branches that all double the image."""

    def forward(s: Any, x: Any) -> Any:
        x = F.relu(s.stem(x))
        y = F.relu(s.deep(s.up(x)) + s.short(x))
        return s.head(F.relu(torch.cat((s.again(y), s.up(s.one(y))), 1)))

    ups = {"short": nn.ConvTranspose2d(3, 4, 2, 2), "again": nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, bias=False)}
    return Net(
        forward,
        stem=conv(3, 3),
        up=nn.UpsamplingNearest2d(scale_factor=2),
        deep=conv(3, 4),
        one=conv(4, 2, 1),
        head=conv(4, 3),
        **ups,
    )


def transposed_convolutions() -> nn.Module:
    """Any kernel, stride, padding, output padding, dilation and groups; short ones leave outputs that read nothing."""
    layers = (nn.ConvTranspose2d(4, 6, (4, 3), 2, (1, 2), (0, 1), 2), nn.ReLU(), conv(6, 4), nn.ReLU())
    short = nn.ConvTranspose2d(4, 4, (1, 2), (2, 3), output_padding=(1, 0), groups=4, bias=False)
    return nn.Sequential(conv(3, 4, bias=False), nn.ReLU(), *layers, short, nn.ReLU(), conv(4, 3))


def generator() -> nn.Module:
    """DCGAN's: transposed convolutions, norms and activations in a row."""
    layers = (nn.ConvTranspose2d(3, 4, 4, 1, 0, bias=False), nn.BatchNorm2d(4), nn.ReLU(True))
    more = (nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(True), nn.ConvTranspose2d(3, 3, 4, 2, 1))
    return nn.Sequential(*layers, *more, nn.Tanh())


def upsampling_one_dimension() -> nn.Module:
    layers = (nn.Upsample(scale_factor=3), nn.Conv1d(3, 4, 5, padding=2), nn.ReLU(), nn.ConvTranspose1d(4, 4, 5, 2, 1, dilation=2))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv1d(4, 3, 2))


def upsampling_three_dimensions() -> nn.Module:
    layers = (nn.Upsample(scale_factor=(1, 2, 2)), nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU())
    return nn.Sequential(nn.Conv3d(3, 2, (3, 1, 1)), nn.ReLU(), *layers, nn.ConvTranspose3d(3, 2, (1, 1, 2), (1, 1, 2)))


_SPECIMENS = (
    nested_residual, projection_skip, option_a_skip, stride, dilation, groups, depthwise, inverted_residual, zero_pad_module,
    zero_pad_function, same_padding, non_square, no_bias, pre_activation, inplace_module, inplace_function, inplace_method,
    overwritten_skip, activations, shared_module, tied_weights, second_user, concat_branches, difference, repvgg_block,
    dropout, one_channel, average_pool, slices, one_dimension, three_dimensions, decoder, parallel_upsampling,
    transposed_convolutions, generator, upsampling_one_dimension, upsampling_three_dimensions,
)  # fmt: skip

RESIDUALS: Mapping[str, Callable[[], nn.Module]] = {
    "residual_plus": _residual(lambda a, b: a + b),
    "residual_plus_equals": _residual(_plus_equals),
    "residual_torch_add": _residual(torch.add),
    "residual_method_add": _residual(lambda a, b: a.add(b)),
    "residual_method_add_in_place": _residual(lambda a, b: a.add_(b)),
    "residual_keyword_add": _residual(lambda a, b: torch.add(b, other=a)),
}

ZOO: Mapping[str, Callable[[], nn.Module]] = {**RESIDUALS, **{build.__name__: build for build in _SPECIMENS}}

#: Image sizes of the specimens that do not take square images of two dimensions.
_SIZES = {
    "one_dimension": (13,),
    "three_dimensions": (9, 11, 10),
    "upsampling_one_dimension": (13,),
    "upsampling_three_dimensions": (9, 6, 5),
}


def specimen(name: str, *, seed: int = 0) -> nn.Module:
    """A net of the zoo in float64 and eval mode, with random weights and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ZOO[name]().double()
    return randomise_(model, seed, images(name, batch=4)).eval()


def images(name: str = "", *, batch: int = 2, size: Sequence[int] = (12, 12), seed: int = 0) -> Tensor:
    """Normal noise in float64 of the shape that a specimen takes; ``size`` is for those that take images."""
    shape = (batch, 3, *_SIZES.get(name, size))
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise_(model: nn.Module, seed: int, inputs: Tensor) -> nn.Module:
    """Random weights, norm statistics and norm parameters, in place; activations neither vanish nor explode.

    Weights are He's. Statistics are those of ``inputs``, then disturbed; leaves the model in the mode it was in.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3, generator=generator)
        for norm in norms:
            norm.weight.uniform_(0.6, 1.4, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
            norm.momentum = 1.0
        if norms:
            model.train()(inputs.clone())
        for norm in norms:
            norm.momentum = 0.1
            disturbance = torch.randn(norm.num_features, dtype=inputs.dtype, generator=generator)
            norm.running_mean += 0.3 * disturbance * norm.running_var.sqrt()
            norm.running_var *= torch.rand(norm.num_features, dtype=inputs.dtype, generator=generator) + 0.5
    return model.train(training)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: every other pixel, missing channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, with the keys of ``shared/weights``."""

    def __init__(self, depth: int, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv(3, width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)

    def _stage(self, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(CifarBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(depth: int, *, width: int = 16) -> nn.Module:
    """A CIFAR ResNet of 6n + 2 layers."""
    return CifarResNet(depth, width)


class RepVggBlock(nn.Module):
    """A 3x3, a 1x1 and, where the shape is kept, an identity, each with its norm, added (Ding et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(conv(inputs, outputs, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.pointwise = nn.Sequential(conv(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.pointwise(x)
        return F.relu(out if self.identity is None else out + self.identity(x))


def repvgg(widths: Sequence[int] = (8, 8, 12, 16), blocks: Sequence[int] = (1, 2, 3, 1)) -> nn.Module:
    """A small RepVGG in its training form; every stage halves the image."""
    layers: list[nn.Module] = []
    for inputs, outputs, count in zip((3, *widths), widths, blocks, strict=False):
        layers += [RepVggBlock(inputs, outputs, 2), *(RepVggBlock(outputs, outputs, 1) for _ in range(count - 1))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet with a part of its planes."""

    def __init__(self, block: Any, layers: list[int], *, divisor: int, **options: Any) -> None:
        self.divisor = divisor
        super().__init__(block, layers, num_classes=10, **options)
        self.fc = nn.Linear(512 // divisor * block.expansion, 10)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 64 // self.divisor
            self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, planes // self.divisor, *args, **options)


def _narrow_vgg16_bn(divisor: int) -> nn.Module:
    from torchvision.models import vgg

    plan = [entry if entry == "M" else int(entry) // divisor for entry in vgg.cfgs["D"]]
    with torch.device("meta"):  # the classifier alone is 800 MB
        model = vgg.VGG(vgg.make_layers(plan, batch_norm=True), num_classes=10)
        model.classifier = nn.Sequential(nn.Linear(512 // divisor * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def _resnet(block: str, layers: list[int], divisor: int, **options: Any) -> Callable[[], nn.Module]:
    kind = getattr(torchvision.models.resnet, block)
    return lambda: NarrowResNet(kind, layers, divisor=divisor, **options)


def _mobilenet(width: float, divisor: int = 4) -> Callable[[], nn.Module]:
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    narrow = [[expansion, channels // divisor, blocks, stride] for expansion, channels, blocks, stride in table]
    return lambda: torchvision.models.MobileNetV2(num_classes=10, width_mult=width, inverted_residual_setting=narrow)


#: The networks of the law: torchvision's own code with fewer planes, so that multiplying out in float64 stays cheap.
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": _resnet("BasicBlock", [2, 2, 2, 2], 8),
    "resnet34": _resnet("BasicBlock", [3, 4, 6, 3], 8),
    "resnet50": _resnet("Bottleneck", [3, 4, 6, 3], 8),
    "resnext50_32x4d": _resnet("Bottleneck", [3, 4, 6, 3], 8, groups=4, width_per_group=8),
    "mobilenet_v2_1.0": _mobilenet(1.0),
    "mobilenet_v2_1.4": _mobilenet(1.4),
    "vgg16_bn": lambda: _narrow_vgg16_bn(8),
    "repvgg": repvgg,
    "cifar_resnet20": lambda: cifar_resnet(20),
    "cifar_resnet56": lambda: cifar_resnet(56),
}


def network(name: str, *, seed: int = 0) -> nn.Module:
    """A network of the law in float64 and eval mode, with random weights and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]().double()
    return randomise_(model, seed, images(batch=4, size=(40, 40))).eval()
