"""ResNet-20 for small images."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut without parameters.

    ``y = relu(s + bn(conv(relu(bn(conv(x))))))``. The shortcut s is x, or where the block widens and halves,
    every other pixel of x with channels of zeros on both sides (option A). It carries the error by autograd.

    Args:
        channels: Channels of x.
        width: Channels of y.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width == channels else 2
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.added = width - channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same, or to half the height and width."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            low = self.added // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, low, self.added - low))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """A convolution, three stages of three blocks with 16, 32 and 64 channels, mean over positions, linear.

    Args:
        channels: Channels of the images, of any size.
        classes: Numbers of the output.

    Source: He, Zhang, Ren and Sun 2016 (CVPR), section 4.2, n = 3, option A; weights as in He et al. 2015.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.stage2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.stage3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))
