"""ResNets with basic blocks and a 3x3 stem, for images of about 32x32."""

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv:1512.03385, figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of basic blocks behind a 3x3 stem without pooling.

    The names in its state dict are those of kuangliu/pytorch-cifar, so weights move both ways.

    Args:
        blocks: number of blocks in each of the four stages.
        num_classes: K, the number of logits.
        width: channels of the stem and first stage, 8 or more; it doubles at each later stage.

    Shape:
        (N, 3, H, W) float -> (N, K) logits; trained at 32x32.

    Raises:
        ValueError: a width under 8.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int = 10, width: int = 64):
        super().__init__()
        if width < 8:
            # There, on CPUs without AVX-512, PyTorch's gradient of a shortcut writes past its memory:
            # crashes, hangs, wrong numbers (oneDNN issue 6035, open; seen with torch 2.15.0).
            raise ValueError(f"width of a ResNet must be at least 8, not {width}")
        w = width
        self.conv1 = nn.Conv2d(3, w, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = stage(w, w, blocks[0], stride=1)  # (N, 64, 32, 32)
        self.layer2 = stage(w, 2 * w, blocks[1], stride=2)  # (N, 128, 16, 16)
        self.layer3 = stage(2 * w, 4 * w, blocks[2], stride=2)  # (N, 256, 8, 8)
        self.layer4 = stage(4 * w, 8 * w, blocks[3], stride=2)  # (N, 512, 4, 4)
        self.linear = nn.Linear(8 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)


def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks, the first of which changes width and resolution."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def ResNet18(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-18: 11,173,962 parameters, 555 M multiply-adds at 32x32."""
    return ResNet((2, 2, 2, 2), num_classes, width)


def ResNet34(num_classes: int = 10, width: int = 64) -> ResNet:
    """ResNet-34: 21,282,122 parameters, 1,159 M multiply-adds at 32x32."""
    return ResNet((3, 4, 6, 3), num_classes, width)
