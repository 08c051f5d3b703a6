"""Two small image encoders: (B, channels, height, width) float32 to (B, dim)."""

from torch import nn

from xbm.experiments.plan import CONV

STAGES = ((32, 1), (64, 2), (128, 2), (256, 2))  # channels and stride of each residual stage of two blocks
LARGEST = 56  # pixels; the residual net's stem halves the picture until its shorter side is at most this


def conv_net(dim, shape=(1, 28, 28)):
    """Return a plain convolutional encoder for pictures of one shape (channels, height, width).

    Four blocks of convolution, batch norm and ReLU, then one linear layer on the flattened features.
    """
    channels, *sides = shape
    layers = []
    for width, stride in CONV:
        layers += convolution(channels, width, stride)
        channels, sides = width, [-(-side // stride) for side in sides]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides[0] * sides[1], dim))


def residual_net(dim, shape=(3, 224, 224)):
    """Return a small residual encoder. It is built for one shape, but accepts pictures of any size.

    A stem, four stages of two basic blocks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016),
    global average pooling, and one linear layer.
    """
    channels, *sides = shape
    width, side = STAGES[0][0], min(sides)
    layers = convolution(channels, width, 1)
    while side > LARGEST:
        layers += convolution(width, width, 2)
        side = -(-side // 2)
    channels = width
    for width, stride in STAGES:
        layers += [Residual(channels, width, stride), Residual(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, dim))


BUILDERS = {"conv": conv_net, "resnet": residual_net}


def convolution(channels, width, stride):
    """Return the layers of a 3 x 3 convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


class Residual(nn.Module):
    """Two convolutions and a shortcut: y = relu(f(x) + s(x)), where s is the identity if the shapes match."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = nn.Sequential(*convolution(channels, width, stride), *convolution(width, width, 1)[:-1])
        nn.init.zeros_(self.body[-1].weight)  # a new block computes its shortcut only
        self.shortcut = nn.Identity()
        if (channels, stride) != (width, 1):
            resized = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(resized, nn.BatchNorm2d(width))

    def forward(self, x):
        return (self.body(x) + self.shortcut(x)).relu()


class Mean(nn.Module):
    """Global average pooling, (B, C, H, W) to (B, C). Unlike adaptive pooling, its gradient is deterministic."""

    def forward(self, x):
        return x.mean((2, 3))
