"""Small networks for small images, in the variants of which the conservation law is asked."""

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["Shortcut", "normalised", "pooled", "residual"]


class Shortcut(nn.Module):
    """``y = relu(x + W x + b)``: a shortcut around a layer, added before the activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return (x + self.map(x)).relu()


def residual(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A perceptron of two hidden layers of 64 neurons with a shortcut around the second."""
    channels, height, width = shape
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(channels * height * width, 64),
            act1=nn.ReLU(),
            block=Shortcut(64),
            fc3=nn.Linear(64, classes),
        )
    )


def pooled(shape: tuple[int, int, int], classes: int, *, normalised: bool = False) -> nn.Module:
    """Two convolutions of 8 and 16 channels, ReLU and max pooling after each, and two linear layers.

    Args:
        shape: Channels, height and width of the images.
        classes: Numbers of the output.
        normalised: Batch normalisation behind each convolution, which then has no bias.
    """
    channels, *sides = shape
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(((channels, 8), (8, 16)), 1):
        parts[f"conv{number}"] = nn.Conv2d(before, after, 3, padding=1, bias=not normalised)
        if normalised:
            parts[f"norm{number}"] = nn.BatchNorm2d(after)
        parts[f"act{number}"] = nn.ReLU()
        parts[f"pool{number}"] = nn.MaxPool2d(2)
    left = [side // 4 for side in sides]
    parts["flatten"] = nn.Flatten()
    parts["fc1"] = nn.Linear(16 * left[0] * left[1], 64)
    parts["act3"] = nn.ReLU()
    parts["fc2"] = nn.Linear(64, classes)
    return nn.Sequential(parts)


def normalised(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """``pooled`` with batch normalisation."""
    return pooled(shape, classes, normalised=True)
