"""ResNets (He et al. 2016) as MoCo v3 trains them: batch norms over the batch of all ranks, and the
last norm of each residual branch starting at zero. Earlier methods start it at one.

Parameters and buffers have torchvision's names (`conv1.weight`, `bn1.running_mean`,
`layer1.0.conv1.weight`, `layer1.0.downsample.0.weight`), and the feature is the mean over positions
after the last block. So weights go to and from torchvision, except for its classifier `fc`, which
is not built. An objective attaches its projector as `head`, like that of a ViT; in checkpoints of
the official release the projector is `fc`.

`resnet_nano` is our own, for images of 8 to 64 pixels on a CPU: one basic block in each of the four
stages, widths 16, 32, 64 and 128, and a stem of one 3x3 convolution with stride 2, without pooling.

`recompute("full")` keeps the input of each block and computes the block again in the backward.
That pass does not move the running averages of batch norms a second time (`repeated_pass`).

Legend: B images, C channels, H and W positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.sync_batch_norm import BatchNorm, repeated_pass
from fastmoco.models.blocks import Recompute, checkpointed
from fastmoco.models.encoder import Coupling, Family, Parts

COUPLES = "the batch norms of a ResNet take the statistics of the whole batch"
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Convolution(nn.Conv2d):
    """A convolution without bias that keeps the positions but for its stride.

    Normal weights with deviation sqrt(2 / fan-out), as in torchvision. On a single position the
    stride makes no difference, and is not used: torch 2.13 leaves most of the gradient of a 3x3
    weight uninitialised there, for bf16 and a stride of 2 on a CPU.
    """

    def __init__(self, before: int, after: int, size: int, stride: int = 1) -> None:
        super().__init__(before, after, size, stride=stride, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride], rounded up."""
        stride = (1, 1) if x.shape[2:].numel() == 1 else self.stride
        return F.conv2d(x, self.weight, stride=stride, padding=self.padding)


class ResidualBlock(nn.Module, ABC):
    """A block of a ResNet: ReLU of the sum of a branch and a shortcut.

    Args:
        before: channels of the input.
        width: channels between the convolutions of the branch.
        stride: of the branch and of the shortcut.

    Attributes:
        recompute: the activations that the backward computes again, "none" or "full".
        downsample: convolution and norm of the shortcut; None where input and output have the same
            shape.
    """

    expansion: ClassVar[int]
    """Channels of the output over `width`."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.build_branch(before, width, stride)
        after = width * self.expansion
        self.downsample: nn.Sequential | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(Convolution(before, after, 1, stride), BatchNorm(after))

    @abstractmethod
    def build_branch(self, before: int, width: int, stride: int) -> None:
        """Make the layers of the branch."""

    @property
    @abstractmethod
    def last_norm(self) -> BatchNorm:
        """The norm that ends the branch."""

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """The branch, after its last norm."""

    @abstractmethod
    def convolutions(self) -> list[Convolution]:
        """The convolutions of the branch, first to last."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, expansion * width, H / stride, W / stride]."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x)
        return checkpointed(self._whole, x, repeated_pass, draws=False)

    def _whole(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += x if self.downsample is None else self.downsample(x)
        return out.relu_()


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, of ResNet-18 and 34."""

    expansion = 1

    def build_branch(self, before: int, width: int, stride: int) -> None:
        """The stride is that of the first convolution."""
        self.conv1 = Convolution(before, width, 3, stride)
        self.bn1 = BatchNorm(width)
        self.conv2 = Convolution(width, width, 3)
        self.bn2 = BatchNorm(width)

    @property
    def last_norm(self) -> BatchNorm:
        """After the second convolution."""
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        """Norm and ReLU after the first convolution, a norm after the second."""
        out = self.bn1(self.conv1(x)).relu_()
        normed: Tensor = self.bn2(self.conv2(out))
        return normed

    def convolutions(self) -> list[Convolution]:
        """Both."""
        return [self.conv1, self.conv2]


class Bottleneck(ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 convolution, of ResNet-50."""

    expansion = 4

    def build_branch(self, before: int, width: int, stride: int) -> None:
        """The stride is that of the 3x3 convolution, as in torchvision."""
        self.conv1 = Convolution(before, width, 1)
        self.bn1 = BatchNorm(width)
        self.conv2 = Convolution(width, width, 3, stride)
        self.bn2 = BatchNorm(width)
        self.conv3 = Convolution(width, self.expansion * width, 1)
        self.bn3 = BatchNorm(self.expansion * width)

    @property
    def last_norm(self) -> BatchNorm:
        """After the third convolution."""
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        """Norm and ReLU after the first two convolutions, a norm after the third."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        normed: Tensor = self.bn3(self.conv3(out))
        return normed

    def convolutions(self) -> list[Convolution]:
        """All three."""
        return [self.conv1, self.conv2, self.conv3]


class ResNet(nn.Module):
    """A ResNet whose feature is the mean over the positions of its last block.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of the four stages.
        widths: of the blocks of the four stages.
        stem: "full" is a 7x7 convolution and max pooling, each with stride 2; "small" is a 3x3
            convolution with stride 2.
        image_size: height and width of the largest images, in pixels. Only `most_numbers` uses it;
            the encoder takes images of any size.
        zero_residual: whether the last norm of each residual branch starts at zero, so that a block
            starts as its shortcut.

    Attributes:
        embed_dim: channels of the feature.
        coupling: always `Coupling.TRUNK`: the norms see the whole batch, so two views may not share
            a batch, and a batch may not go in chunks.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    family: Family = "resnet"
    coupling = Coupling.TRUNK
    coupling_reason = COUPLES

    def __init__(
        self,
        *,
        block: type[ResidualBlock],
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        stem: Literal["full", "small"] = "full",
        image_size: int = 224,
        zero_residual: bool = True,
    ) -> None:
        super().__init__()
        for name, numbers in (("depths", depths), ("widths", widths)):
            if len(numbers) != len(STAGES) or min(numbers) < 1:
                raise ValueError(f"{name}={numbers}: needs {len(STAGES)} numbers of at least 1")
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: must be at least 1 pixel")
        self.image_size = image_size
        self.embed_dim = widths[-1] * block.expansion
        self.conv1 = Convolution(3, widths[0], 7 if stem == "full" else 3, 2)
        self.bn1 = BatchNorm(widths[0])
        self.maxpool: nn.Module = nn.Identity()
        if stem == "full":
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        # The stages: the first block of each but the first halves the positions.
        channels = (widths[0], *(width * block.expansion for width in widths))
        for i, (name, depth, width) in enumerate(zip(STAGES, depths, widths, strict=True)):
            before, after = channels[i], channels[i + 1]
            blocks = [block(before, width, 1 if i == 0 else 2)]
            blocks += [block(after, width, 1) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*blocks))
        if zero_residual:
            for residual in self._blocks():
                nn.init.zeros_(_weight(residual.last_norm))
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images -> [B, E] features, at least float32.

        Raises:
            ValueError: if the images are not [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images shape={tuple(images.shape)}: this encoder takes [B, 3, H, W]")
        # Convolutions in 16 bits are fastest with channels last.
        if images.is_cuda and (images.dtype.itemsize == 2 or torch.is_autocast_enabled("cuda")):
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(self.bn1(self.conv1(images)).relu_())
        for block in self._blocks():
            x = block(x)
        features: Tensor = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return features

    def plain(self, images: Tensor) -> Tensor:
        """Reference of `forward`: each block in turn, nothing recomputed."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for block in self._blocks():
            shortcut = x if block.downsample is None else block.downsample(x)
            x = torch.relu(block.branch(x) + shortcut)
        features: Tensor = x.flatten(2).mean(2)
        return features

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again.

        Raises:
            ValueError: for "selective", which is a choice among the parts of transformer blocks.
        """
        if what == "selective":
            raise ValueError(
                "recompute='selective': a ResNet has no layer norms and GELU; use full or none"
            )
        for block in self._blocks():
            block.recompute = what

    def parts(self) -> Parts:
        """Modules by role. Blocks differ in shape, so measurements may not leave any out."""
        return Parts(
            stem={"conv1": self.conv1},
            blocks=nn.ModuleList(self._blocks()),
            heads={"head": self.head},
            methods={"": ("forward",)},
            alike=False,
        )

    def most_numbers(self, side: int | None = None) -> int:
        """Upper bound on the elements that training keeps per view, at least twice the true value.

        The true value is about two per output of a convolution: the output and its norm after ReLU.

        Args:
            side: pixels per side of the view; default `image_size`.
        """
        sides = self._sides(self.image_size if side is None else side)
        outputs = (layer.out_channels * out**2 for layer, out in sides)
        return 6 * sum(outputs)

    def forward_flops(self, side: int, keep: float = 1.0) -> float:
        """FLOPs of the convolutions in one forward of a view of this many pixels per side; `keep`
        has no effect, because it has no tokens.
        """
        return float(sum(2 * layer.weight.numel() * out**2 for layer, out in self._sides(side)))

    def _blocks(self) -> list[ResidualBlock]:
        """All blocks, first to last."""
        stages = [self.get_submodule(name) for name in STAGES]
        return [
            block
            for stage in stages
            for block in stage.children()
            if isinstance(block, ResidualBlock)
        ]

    def _sides(self, side: int) -> Iterator[tuple[Convolution, int]]:
        """Every convolution with the height of its output, for images of a height."""
        side = _halved(side)
        yield self.conv1, side
        if isinstance(self.maxpool, nn.MaxPool2d):
            side = _halved(side)
        for block in self._blocks():
            before = side
            for layer in block.convolutions():
                side = side if layer.stride[0] == 1 else _halved(side)
                yield layer, side
            if block.downsample is not None:
                shortcut = block.downsample[0]
                assert isinstance(shortcut, Convolution)  # noqa: S101 - a type: of a shortcut's first layer
                yield shortcut, before if shortcut.stride[0] == 1 else _halved(before)


def _weight(norm: BatchNorm) -> Tensor:
    assert norm.weight is not None  # noqa: S101 - a type: norms here have weights
    return norm.weight


def _halved(side: int) -> int:
    """Positions after a stride of 2 with the padding of this module."""
    return (side + 1) // 2


@dataclass(frozen=True, slots=True)
class ResNetArchitecture:
    """A size of the ResNet; calling it builds an encoder of this size.

    Attributes:
        block: the kind of its blocks.
        depths: blocks of each stage.
        widths: of the blocks of each stage.
        stem: "full" or "small", see `ResNet`.
        image_size: default pixels per side of an image.
    """

    block: type[ResidualBlock]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: Literal["full", "small"] = "full"
    image_size: int = 224

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return self.widths[-1] * self.block.expansion

    def __call__(self, *, image_size: int | None = None, zero_residual: bool = True) -> ResNet:
        """Build an encoder; the arguments are those of `ResNet`."""
        return ResNet(
            block=self.block,
            depths=self.depths,
            widths=self.widths,
            stem=self.stem,
            image_size=self.image_size if image_size is None else image_size,
            zero_residual=zero_residual,
        )


resnet_nano = ResNetArchitecture(
    BasicBlock, (1, 1, 1, 1), (16, 32, 64, 128), stem="small", image_size=32
)
resnet18 = ResNetArchitecture(BasicBlock, (2, 2, 2, 2))
resnet34 = ResNetArchitecture(BasicBlock, (3, 4, 6, 3))
resnet50 = ResNetArchitecture(Bottleneck, (3, 4, 6, 3))

RESNETS = {
    name: value for name, value in globals().items() if isinstance(value, ResNetArchitecture)
}
"""ResNets by name."""
