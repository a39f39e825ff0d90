import torch
from torch import nn
from torch.nn import functional as F


class Upright(nn.Module):
    """Brings each digit into a standard pose: centred, without slant, of a more even size.

    Nothing here is learned; the pose is read off the moments of the ink. The centre is its mean, the
    slant its regression of x on y, and its standard deviations, along y and across the slant, are
    moved halfway (on a logarithmic scale) to those of an average digit. After C.-L. Liu et al.,
    "Handwritten digit recognition: investigation of normalization and feature extraction
    techniques", Pattern Recognition 37(2), 2004.

    Takes normalised images, float32 (N, 1, 28, 28); returns the same with the background at 0.
    """

    BACKGROUND = -0.1307 / 0.3081  # a pixel without ink, normalised
    WIDTH, HEIGHT = 0.26, 0.39  # standard deviations of an average digit, half a side being 1

    def __init__(self):
        super().__init__()
        axis = (torch.arange(28) + 0.5) / 14 - 1  # the centres of the pixels, from -1 to 1
        y, x = (plane.flatten() for plane in torch.meshgrid(axis, axis, indexing="ij"))
        self.register_buffer("monomials", torch.stack([x**0, x, y, x * x, x * y, y * y], 1), persistent=False)
        # The same axis to the last bit as that of `affine_grid`, which takes ten times as long on a CPU.
        self.register_buffer("axis", torch.linspace(-1, 1, 28) * 27 / 28, persistent=False)

    def forward(self, images):
        ink = F.relu(images - self.BACKGROUND)
        moments = ink.flatten(1) @ self.monomials
        x, y, xx, xy, yy = (moments[:, 1:] / moments[:, :1].clamp(min=1e-3)).unbind(1)
        xx, xy, yy = xx - x * x, xy - x * y, (yy - y * y).clamp(min=1e-3)
        x, y, xx, xy, yy = (moment[:, None, None] for moment in (x, y, xx, xy, yy))
        slant = xy / yy
        height = (yy.sqrt() / self.HEIGHT).sqrt()
        width = ((xx - slant * xy).clamp(min=1e-2).sqrt() / self.WIDTH).sqrt()
        right, down = self.axis, self.axis[:, None]
        x = width * right + slant * height * down + x
        y = (height * down + y).expand_as(x)
        return F.grid_sample(ink, torch.stack([x, y], 3), align_corners=False)


class Model_2(nn.Sequential):
    """Intermediate digit classifier, 15,106 parameters: Model_1 with fewer channels, a pose and dropout.

    Takes normalised images, float32 (N, 1, 28, 28), and returns logits, float32 (N, 10).
    Dropout: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", JMLR 15, 2014.
    """

    def __init__(self):
        super().__init__(
            Upright(),  # 1 x 28 x 28, as the input
            nn.Conv2d(1, 6, 3, padding=1),  # 6 x 28 x 28
            nn.MaxPool2d(2),  # 6 x 14 x 14
            nn.ReLU(),
            nn.Conv2d(6, 12, 3, padding=1),  # 12 x 14 x 14
            nn.MaxPool2d(2),  # 12 x 7 x 7
            nn.ReLU(),
            nn.Flatten(),  # 588
            nn.Dropout(0.2),  # here: the next layer holds 14,136 of the 15,106 parameters
            nn.Linear(588, 24),
            nn.ReLU(),
            nn.Linear(24, 10),
        )
