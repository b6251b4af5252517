"""Omni-dimensional dynamic convolution: n kernels, mixed for every sample by attention along all four of their dimensions.

Ref: C. Li, A. Zhou, A. Yao, Omni-Dimensional Dynamic Convolution, ICLR 2022, arXiv 2209.07947, eq. 2; architecture of the
attention and where it is used: the authors' released code (github.com/OSVAI/ODConv). State dicts have that code's key names and
its checkpoints load (their weights (n, outputs, inputs / groups, k, k) are stacked on the first axis).

With attentions a_w (kernel), a_f (filter, that is output channel), a_c (input channel) and a_s (position in the kernel):
``y = (sum_n a_w[n] * a_f * a_c * a_s * W[n]) conv x``. None of a_f, a_c and a_s depends on n here, as in the code. Two forms give
that same y:

* ``dynamic``: a_c scales the input, a_f the output, and one kernel is mixed for each sample: about the MACs of a plain
  convolution, but weights that depend on the data;
* ``static``: a_c and a_s scale the input's patches, the weights multiply them as they are, and a_w and a_f scale the results:
  n times the MACs, but every weight is constant, as an accelerator with compressed, N:M sparse weights needs.

Shapes: B images, C input channels, O output channels, H and W pixels, n kernels of (O, C / groups, kh, kw), P = kh * kw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from models import mobilenet, resnet
from models.checks import check_images
from models.info import ModelInfo, Published, image
from models.registry import describe_models, register_model
from models.vision import build_vision_model

__all__ = [
    "FORMS",
    "NETWORKS",
    "SHORTCUTS",
    "KernelAttention",
    "ODConv2d",
    "convert",
    "dynamic_conv2d",
    "set_temperature",
    "static_conv2d",
    "temperature_schedule",
]

FORMS = ("dynamic", "static")

SHORTCUTS = ("*.downsample.*", "*.proj.*")
"""Globs of the convolutions on the residual of a ResNet or RegNet, which `convert` leaves alone unless told otherwise."""


class KernelAttention(nn.Module):
    """Attention of one convolution: (B, C, H, W) -> channel (B, C, 1, 1), filter (B, O, 1, 1), position (B, P), kernel (B, n).

    Mean over the pixels, a layer of max(16, C * reduction) channels with batch norm and ReLU, and a linear head for each;
    sigmoid for the first three, softmax for the kernel, both of the logits over ``temperature``. A head that has nothing to
    say is left out and gives None (all ones): filter of a depth-wise convolution, position of a 1x1, kernel if there is one.
    """

    def __init__(self, conv: ODConv2d, *, reduction: float, min_width: int = 16) -> None:
        super().__init__()
        inputs, outputs = conv.in_channels, conv.out_channels
        positions = conv.kernel_size[0] * conv.kernel_size[1]
        width = max(int(inputs * reduction), min_width)
        self.temperature = 1.0
        self.fc = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        depthwise = inputs == outputs == conv.groups
        self.channel_fc = nn.Conv2d(width, inputs, 1)
        self.filter_fc = None if depthwise else nn.Conv2d(width, outputs, 1)
        self.spatial_fc = None if positions == 1 else nn.Conv2d(width, positions, 1)
        self.kernel_fc = None if conv.kernels == 1 else nn.Conv2d(width, conv.kernels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if self.bn.training and len(x) == 1:
            raise ValueError("the attention of dynamic convolutions normalises over the batch: train with two images or more")
        x = self.relu(self.bn(self.fc(F.adaptive_avg_pool2d(x, 1))))
        channel, filters, position, kernel = (
            None if head is None else head(x) / self.temperature
            for head in (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        )
        assert channel is not None
        return (
            channel.sigmoid(),
            None if filters is None else filters.sigmoid(),
            None if position is None else position.flatten(1).sigmoid(),
            None if kernel is None else kernel.flatten(1).softmax(1),
        )


class ODConv2d(nn.Conv2d):
    """A drop-in for ``nn.Conv2d``: (B, C, H, W) -> (B, O, H', W').

    Parameters
    ----------
    kernels
        n; the paper's "1x" and "4x".
    reduction
        Width of the attention over C, the paper's r = 1/16; never below 16 channels.
    form
        ``"dynamic"`` or ``"static"``, see the module's text; may be changed at any time.

    Others as in ``nn.Conv2d``, but padding is numbers and of zeros, and there is no bias unless asked for.

    Members
    -------
    weight
        (n * O, C / groups, kh, kw), the kernels one after the other; each can be N:M sparse along its inputs.
    attention
        `KernelAttention`. Its batch norm needs more than one image in training.

    Raises
    ------
    ValueError
        An option out of range; in use, maps of another shape, no image at all, or in training a single one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        kernels: int = 4,
        reduction: float = 1 / 16,
        form: str = "dynamic",
    ) -> None:
        if not isinstance(kernels, int) or kernels < 1:
            raise ValueError(f"kernels must be an integer >= 1, not {kernels!r}")
        if not 0 < reduction <= 1:
            raise ValueError(f"reduction must be above 0 and at most 1, not {reduction!r}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        if isinstance(padding, str):
            raise ValueError(f"padding must be given in pixels, not {padding!r}")
        self.kernels, self.form = kernels, form
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.weight = nn.Parameter(self.weight.detach().repeat(kernels, 1, 1, 1))
        for kernel in self.weight.detach().chunk(kernels):
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        self.attention = KernelAttention(self, reduction=reduction)

    def forward(self, input: Tensor) -> Tensor:
        check_images(input, self.in_channels, name="maps")
        run = torch.ops.nmforge.dynamic_conv2d if self.form == "dynamic" else torch.ops.nmforge.static_conv2d
        y = run(
            input, self.weight, *self.attention(input), self.kernels, self.stride, self.padding, self.dilation, self.groups
        )
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernels={self.kernels}, form={self.form}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.ndim == 5:  # the authors' code keeps kernels apart
            state_dict[f"{prefix}weight"] = weight.flatten(0, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def dynamic_conv2d(
    input: Tensor, weight: Tensor, channel: Tensor, filters: Tensor | None, position: Tensor | None, kernel: Tensor | None,
    kernels: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """One kernel mixed for each sample; the samples are groups of one convolution.

    Parameters
    ----------
    input
        (B, C, H, W).
    weight
        (n * O, C / groups, kh, kw).
    channel, filters, position, kernel
        See `KernelAttention`.
    kernels, stride, padding, dilation, groups
        n, and as in ``torch.nn.functional.conv2d``; pairs of numbers.

    Returns
    -------
    Tensor
        (B, O, H', W').
    """
    x = input * channel
    if position is None and kernel is None:
        y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    else:
        batch, _, height, width = x.shape
        stacked = weight.unflatten(0, (kernels, -1))
        mixed = stacked if kernel is None else (kernel @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])
        if position is not None:
            mixed = mixed * position.unflatten(1, weight.shape[2:])[:, None, None]
        y = F.conv2d(
            x.reshape(1, -1, height, width), mixed.flatten(0, 1), None, stride, padding, dilation, groups * batch
        )
        y = y.view(batch, -1, y.shape[2], y.shape[3])
    return y if filters is None else y * filters


def static_conv2d(
    input: Tensor, weight: Tensor, channel: Tensor, filters: Tensor | None, position: Tensor | None, kernel: Tensor | None,
    kernels: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The same with constant weights: every kernel multiplies the weighted patches, then the results are mixed.

    Parameters and result as of `dynamic_conv2d`.
    """
    x = input * channel
    size = weight.shape[2:]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    patches = F.unfold(x, size, tuple(dilation), tuple(padding), tuple(stride))
    patches = patches.unflatten(1, (groups, -1, size.numel()))  # (B, g, C / g, P, L)
    if position is not None:
        patches = patches * position[:, None, None, :, None]
    rows = weight.flatten(1).unflatten(0, (kernels, groups, -1))  # (n, g, O / g, C / g * P)
    y = torch.einsum("ngok,bgkl->bngol", rows, patches.flatten(2, 3))
    y = y[:, 0] if kernel is None else (y * kernel[:, :, None, None, None]).sum(1)
    y = y.reshape(len(x), -1, height, width)
    return y if filters is None else y * filters


# One operator each in an exported graph, so that channel pruning and compilers see a convolution where there is one; whoever does
# not know it decomposes it to torch's own (ExportedProgram.run_decompositions).
_LIBRARY = torch.library.Library("nmforge", "FRAGMENT")
for _form in (dynamic_conv2d, static_conv2d):
    _LIBRARY.define(
        f"{_form.__name__}(Tensor input, Tensor weight, Tensor channel, Tensor? filters, Tensor? position, Tensor? kernel, "
        "int kernels, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
    )
    _LIBRARY.impl(_form.__name__, _form, "CompositeImplicitAutograd")


def convert(
    model: nn.Module,
    *,
    kernels: int = 4,
    reduction: float = 1 / 16,
    form: str = "dynamic",
    stem: bool = False,
    exclude: Iterable[str] = SHORTCUTS,
) -> tuple[str, ...]:
    """Make the convolutions of any network dynamic, in place; their weights start anew.

    Parameters
    ----------
    kernels, reduction, form
        See `ODConv2d`.
    stem
        Whether the first convolution, too.
    exclude
        Globs of the names of layers that stay.

    Returns
    -------
    tuple[str, ...]
        Names of the layers that were made dynamic.

    Raises
    ------
    ValueError
        None is left to convert, a layer pads with other than zeros, or is parametrised (convert first, then sparsify).
    """
    globs = tuple(exclude)
    found = _convolutions(model)
    names = [name for name in found[0 if stem else 1 :] if not any(fnmatchcase(name, glob) for glob in globs)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no convolution to make dynamic, but for the first and {', '.join(globs)}")
    made: dict[int, ODConv2d] = {}  # a layer that is used in several places stays one
    for name in names:
        part = model.get_submodule(name)
        owner, _, own = name.rpartition(".")
        if id(part) not in made:
            made[id(part)] = _dynamic(name, cast(nn.Conv2d, part), kernels=kernels, reduction=reduction, form=form)
        setattr(model.get_submodule(owner), own, made[id(part)])
    return tuple(names)


def _convolutions(model: nn.Module) -> list[str]:
    """Names of plain convolutions, not those of the attention of dynamic ones; of subclasses, only parametrised ones."""
    named = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, part in named if isinstance(part, ODConv2d))
    plain = [name for name, part in named if type(part) is nn.Conv2d or _parametrised(part)]
    return [name for name in plain if name and not name.startswith(inside)]


def _parametrised(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv2d) and parametrize.is_parametrized(part)


def _dynamic(name: str, part: nn.Conv2d, **options: Any) -> ODConv2d:
    if _parametrised(part):
        raise ValueError(f"layer {name!r} is parametrised: convert() first, then sparsify()")
    if part.padding_mode != "zeros" or isinstance(part.padding, str):
        raise ValueError(f"layer {name!r} pads by {part.padding_mode!r}, {part.padding!r}: only zeros, in pixels, are known")
    with torch.device(part.weight.device):
        made = ODConv2d(
            part.in_channels, part.out_channels, part.kernel_size, part.stride, part.padding, part.dilation,  # type: ignore[arg-type]
            part.groups, part.bias is not None, **options,
        )  # fmt: skip
    return made.to(part.weight.dtype).train(part.training)


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set what the attention's logits are divided by, in all dynamic convolutions.

    Raises
    ------
    ValueError
        Not above 0, or there is no dynamic convolution.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature!r}")
    found = [part for part in model.modules() if isinstance(part, KernelAttention)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no dynamic convolution: convert() it first")
    for part in found:
        part.temperature = float(temperature)


def temperature_schedule(*, start: float = 30.0, share: float = 0.1) -> Callable[[nn.Module, int, int], None]:
    """A hook that anneals the temperature linearly from ``start`` to 1 in the first ``share`` of the steps.

    The paper's: from 30 in 10 of 100 epochs. Near-uniform attention lets all kernels learn at first (section 3.3).

    Returns
    -------
    Callable
        (model, step, steps), the ``before_step`` of `algo.train.train`; it depends on the step alone, so that a resumed training
        goes on as it was.

    Raises
    ------
    ValueError
        ``start`` below 1, or ``share`` outside [0, 1].
    """
    if not start >= 1:
        raise ValueError(f"start must be >= 1, not {start!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share!r}")

    def before_step(model: nn.Module, step: int, steps: int) -> None:
        left = max(0.0, 1 - step / (share * steps)) if share else 0.0
        set_temperature(model, 1 + (start - 1) * left)

    return before_step


# -- named networks ------------------------------------------------------------------------------------------------------------

_BASES: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    **{name: (resnet.ResNet, config) for name, config in resnet.CONFIGS.items()},
    **{name: (mobilenet.MobileNetV2, config) for name, config in mobilenet.CONFIGS.items()},
}
_OPTIONS = ("kernels", "reduction", "form")

NETWORKS = {
    "odconv_resnet18_1x": ("resnet18", 1),
    "odconv_resnet18_4x": ("resnet18", 4),
    "odconv_resnet50_1x": ("resnet50", 1),
    "odconv_resnet50_4x": ("resnet50", 4),
    "odconv_resnet101_1x": ("resnet101", 1),
    "odconv_resnet101_2x": ("resnet101", 2),
    "odconv_mobilenetv2_1x": ("mobilenet_v2", 1),
    "odconv_mobilenetv2_4x": ("mobilenet_v2", 4),
    "odconv_mobilenetv2_075_1x": ("mobilenet_v2_075", 1),
    "odconv_mobilenetv2_075_4x": ("mobilenet_v2_075", 4),
    "odconv_mobilenetv2_050_1x": ("mobilenet_v2_050", 1),
    "odconv_mobilenetv2_050_4x": ("mobilenet_v2_050", 4),
}
"""Name -> the network that is converted, and its kernels. Options of both may be given."""


def _register(name: str, base: str, kernels: int) -> Callable[..., nn.Module]:
    kind, config = _BASES[base]

    def builder(*, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
        options = {"kernels": kernels} | {key: overrides[key] for key in _OPTIONS if key in overrides}

        def build(changed: Any) -> nn.Module:
            model = kind(changed)
            convert(model, **options)
            return model

        return build_vision_model(name, build, config, pretrained, overrides, options=_OPTIONS)

    builder.__name__ = name
    builder.__doc__ = f"{base} with dynamic convolutions, {kernels} kernel{'s' * (kernels > 1)} each."
    return register_model(builder)


for _name, (_base, _kernels) in NETWORKS.items():
    _register(_name, _base, _kernels)


def _figures(parameters: int | float, macs: float) -> tuple[Published, ...]:
    """Parameters, exact or in M, and M multiply-adds of the README. Its counter also takes pooling and the products of kernels
    with their attentions; its ResNet-50 and 101 are those of v1 (stride in the 1x1 convolution), not the released code's."""
    source = "OSVAI/ODConv, README"
    counted = Published(source="OSVAI/ODConv at 0901cc1, counted", parameters=int(parameters))
    rounded = Published(source=source, parameters=round(parameters * 1e6), within=2e-3)
    note = "counts pooling and attended kernels too, and ResNet-50 and 101 as v1"
    return (
        counted if isinstance(parameters, int) else rounded,
        Published(source=source, macs=round(macs * 1e6), within=0.06, note=note),
    )


describe_models(
    tuple(NETWORKS),
    ModelInfo(family="ODConv", paper="2209.07947", inputs=image(3, 224)),
    {
        "odconv_resnet18_1x": _figures(11_943_944, 1838),
        "odconv_resnet18_4x": _figures(44_901_640, 1916),
        "odconv_resnet50_1x": _figures(28_635_112, 3916),
        "odconv_resnet50_4x": _figures(90_670_888, 4080),
        "odconv_resnet101_1x": _figures(50_818_769, 7675),
        "odconv_resnet101_2x": _figures(90_441_623, 7802),
        "odconv_mobilenetv2_1x": _figures(4_940_185, 311.8),
        "odconv_mobilenetv2_4x": _figures(11_512_149, 327.1),
        "odconv_mobilenetv2_075_1x": _figures(3.51, 217.1),
        "odconv_mobilenetv2_075_4x": _figures(7.50, 226.3),
        "odconv_mobilenetv2_050_1x": _figures(2.43, 101.8),
        "odconv_mobilenetv2_050_4x": _figures(4.44, 106.4),
    },
)
