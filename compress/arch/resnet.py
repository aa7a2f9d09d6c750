"""ResNet: stages of residual convolutions with BatchNorm, whose running statistics are part of the checkpoint.

The config lists widths and depths stage by stage, and each layer's inner width is a quarter of its outer one, so no
axis can shrink in a stock config: dimensions are plain numbers, and there is no stream of one width to walk.
"""

from collections.abc import Iterator
from typing import Any

from . import ANY, Architecture, Norm, Param, linear

STEM = "@embedder.embedder"


def convolution(name: str, out: int, inp: int, kernel: int) -> tuple[Param, ...]:
    """A convolution without bias and its BatchNorm."""
    norm = f"{name}.normalization"
    return (
        Param(f"{name}.convolution.weight", f"{out}, {inp}, {kernel}, {kernel}"),
        Param(f"{norm}.weight", f"{out}"),
        Param(f"{norm}.bias", f"{out}"),
        Param(f"{norm}.running_mean", f"{out}", kind="buffer"),
        Param(f"{norm}.running_var", f"{out}", kind="buffer"),
        Param(f"{norm}.num_batches_tracked", "", kind="counter"),
    )


def layer(name: str, config: Any, out: int, inp: int, stride: int) -> Iterator[Param]:
    """One residual layer: three convolutions (bottleneck) or two, and a projection where the shape changes."""
    inner = out // 4
    kernels = {
        "bottleneck": ((inner, inp, 1), (inner, inner, 3), (out, inner, 1)),
        "basic": ((out, inp, 3), (out, out, 3)),
    }
    if inp != out or stride != 1:
        yield from convolution(f"{name}.shortcut", out, inp, 1)
    for number, (o, i, kernel) in enumerate(kernels[config.layer_type]):
        yield from convolution(f"{name}.layer.{number}", o, i, kernel)


def layers(config: Any) -> tuple[Param, ...]:
    """All parameters of stem and stages."""
    found = list(convolution(STEM, config.embedding_size, config.num_channels, 7))
    inp = config.embedding_size
    for stage, (out, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        for number in range(depth):
            stride = 2 if number == 0 and (stage > 0 or config.downsample_in_first_stage) else 1
            found += layer(f"@encoder.stages.{stage}.layers.{number}", config, out, inp, stride)
            inp = out
    return tuple(found)


ARCHITECTURE = Architecture(
    model_type="resnet",
    config=(("num_channels", "channels"),),
    axes=(),
    computed={"pooled": lambda config: config.hidden_sizes[-1]},
    blocks="",
    depth="",
    embeddings=(),
    params=(),
    expand=layers,
    branches=(),
    norm=Norm("batch", eps=""),
    stream="post-norm",
    heads={"image-classification": linear("classifier.1", "labels", "pooled")},
    settings={
        "hidden_act": ANY,
        "hidden_sizes": ANY,
        "depths": ANY,
        "embedding_size": ANY,
        "layer_type": ("bottleneck", "basic"),
        "downsample_in_first_stage": ANY,
        "downsample_in_bottleneck": ANY,
        "out_features": ANY,
        "out_indices": ANY,
        "stage_names": ANY,
    },
    inputs="pixels",
    position_ids=False,
    causal=False,
)
