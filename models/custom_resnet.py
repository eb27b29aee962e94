"""The nine-layer residual network of the DAWNBench lineage."""

from torch import Tensor, nn


def conv_block(in_channels: int, out_channels: int, bias: bool, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, optional 2x2 max-pool, batch norm, ReLU, in the order the exercise words it."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),  # not in place: Grad-CAM on the norm before it would see the rectified values
    )


class Residual(nn.Module):
    """x + f(x), f being two convolution blocks of one width."""

    def __init__(self, channels: int, bias: bool):
        super().__init__()
        self.block = nn.Sequential(
            conv_block(channels, channels, bias), conv_block(channels, channels, bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return x + self.block(x)


class CustomResNet(nn.Module):
    """Three stages, two of them residual: 6,573,130 parameters, 379 M multiply-adds at 32x32.

    The network of David Page's cifar10-fast ("How to train your ResNet", 2018), as course exercises
    word it: pool before norm, plain logits.

    Args:
        num_classes: K, the number of logits.
        width: channels after the first layer; the stages have 2, 4 and 8 times as many.
        dropout: probability of dropping a feature before the linear layer.
        bias: biases in the convolutions, which the norms make redundant: 6,575,370 parameters.

    Shape:
        (N, 3, H, W) float -> (N, K) logits; H and W at least 8, trained at 32.
    """

    def __init__(self, num_classes: int = 10, width: int = 64, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        w = width
        self.prep = conv_block(3, w, bias)  # (N, 64, 32, 32)
        self.layer1 = nn.Sequential(  # (N, 128, 16, 16)
            conv_block(w, 2 * w, bias, pool=True), Residual(2 * w, bias)
        )
        self.layer2 = conv_block(2 * w, 4 * w, bias, pool=True)  # (N, 256, 8, 8)
        self.layer3 = nn.Sequential(  # (N, 512, 4, 4)
            conv_block(4 * w, 8 * w, bias, pool=True), Residual(8 * w, bias)
        )
        self.pool = nn.AdaptiveMaxPool2d(1)  # MaxPool2d(4) at 32x32, and any other size too
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K)."""
        x = self.prep(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.pool(x).flatten(1)
        return self.linear(self.dropout(x))
