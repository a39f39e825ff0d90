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

    def forward(self, images):
        ink = F.relu(images - self.BACKGROUND)
        moments = ink.flatten(1) @ self.monomials
        x, y, xx, xy, yy = (moments[:, 1:] / moments[:, :1].clamp(min=1e-3)).unbind(1)
        xx, xy, yy = xx - x * x, xy - x * y, (yy - y * y).clamp(min=1e-3)
        slant = xy / yy
        height = (yy.sqrt() / self.HEIGHT).sqrt()
        width = ((xx - slant * xy).clamp(min=1e-2).sqrt() / self.WIDTH).sqrt()
        rows = [width, slant * height, x, torch.zeros_like(x), height, y]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), ink.shape, align_corners=False)
        return F.grid_sample(ink, grid, align_corners=False)


class SymmetricConv2d(nn.Module):
    """A convolution, without bias, that uses each learned filter in eight poses.

    A stroke is a stroke whichever way it runs: of one set of weights come eight filters, in four
    rotations, each also mirrored, and eight channels. Where the input consists of such channels, a
    pose of the filter also permutes its slices, so that an input turned or mirrored gives the same
    output turned or mirrored, its channels permuted. The group is p4m of T. Cohen, M. Welling,
    "Group equivariant convolutional networks", ICML 2016.

    Takes float32 (N, poses * in_filters, H, W), returns float32 (N, 8 * filters, H', W'); the poses
    of a filter are neighbours.

    Args:
        in_filters: number of the input's filters; 1 for plain images and for `groups` over 1.
        filters: number of learned filters.
        kernel_size, stride, padding, groups: as those of `nn.Conv2d`.
        poses: poses of the input's filters: 8, or 1 for plain images and for `groups` over 1.
    """

    def __init__(self, in_filters, filters, kernel_size, stride=1, padding=0, groups=1, poses=8):
        super().__init__()
        mirrors, turns = (2, 4) if poses == 8 else (1, 1)
        self.weight = nn.Parameter(torch.empty(filters, in_filters, mirrors, turns, kernel_size, kernel_size))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.stride, self.padding, self.groups = stride, padding, groups

        # Which weight stands where in the eight poses: found by turning and mirroring their numbers.
        numbers = torch.arange(self.weight.numel()).view_as(self.weight)
        views = []
        for view in numbers, numbers.flip(-1, 2, 3).roll(1, 3):
            for _ in range(4):
                views.append(view)
                view = view.rot90(1, (-2, -1)).roll(1, 3)
        self.register_buffer("index", torch.stack(views, 1).flatten(2, 4).flatten(0, 1), persistent=False)

    def forward(self, images):
        kernels = self.weight.flatten()[self.index]
        output = F.conv2d(images, kernels, None, self.stride, self.padding, groups=self.groups)
        return output.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU


class Model_3(nn.Sequential):
    """Advanced digit classifier, 4,506 parameters: a pose first, then filters that share weights.

    Takes normalised images, float32 (N, 1, 28, 28), and returns logits, float32 (N, 10).
    Batch normalisation: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015.
    """

    def __init__(self):
        super().__init__(  # input: 1 x 28 x 28; parameters of convolution and normalisation
            Upright(),  # 1 x 28 x 28
            SymmetricConv2d(1, 1, 6, stride=2, padding=2, poses=1),  # 8 x 14 x 14: 36
            nn.BatchNorm2d(8),  # 16
            nn.ReLU(),
            SymmetricConv2d(1, 3, 3, padding=1),  # 24 x 14 x 14: 216
            nn.BatchNorm2d(24),  # 48
            nn.ReLU(),
            nn.MaxPool2d(2),  # 24 x 7 x 7
            SymmetricConv2d(3, 5, 3, padding=1),  # 40 x 7 x 7: 1,080
            nn.BatchNorm2d(40),  # 80
            nn.ReLU(),
            SymmetricConv2d(5, 6, 3, padding=1),  # 48 x 7 x 7: 2,160
            nn.BatchNorm2d(48),  # 96
            nn.ReLU(),
            SymmetricConv2d(1, 6, 7, groups=48, poses=1),  # 48 x 1 x 1: 294, where each feature should be
            nn.Flatten(),  # 48
            nn.Dropout(0.1),  # here, where a feature is one number: no digit may hang on one alone
            nn.Linear(48, 10, bias=False),  # 480
        )
