"""The demo's encoder."""

from torch import nn

BLOCKS = ((32, 2), (32, 2), (64, 2), (64, 1))  # channels and stride of each


def conv_net(dim, *, side=28):
    """Return a small convolutional encoder of grey pictures: (B, 1, side, side) to (B, dim).

    Four blocks of convolution, batch norm and ReLU, then one linear layer.
    """
    layers, channels = [], 1
    for width, stride in BLOCKS:
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels, side = width, -(-side // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, dim))
