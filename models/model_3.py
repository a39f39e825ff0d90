import torch
from torch import nn
from torch.nn import functional as F

from .model_2 import Upright


class SymmetricConv2d(nn.Module):
    """A convolution, without bias, that uses each learned filter in eight poses.

    A stroke is a stroke whichever way it runs: of one set of weights come eight filters, in four
    rotations, each also mirrored, and eight channels. Where the input consists of such channels, a
    pose of the filter also permutes its slices, so that an input turned or mirrored gives the same
    output turned or mirrored, its channels permuted. The group is p4m of T. Cohen, M. Welling,
    "Group equivariant convolutional networks", ICML 2016.

    Takes float32 (N, poses * in_filters, H, W), returns float32 (N, 8 * filters, H', W'); the poses
    of a filter are neighbours. With `groups`, as many as the input has channels, each channel meets
    filters of its own, in its own pose, and their outputs are neighbours.

    Args:
        in_filters: number of the input's filters; 1 for plain images and for `groups` over 1.
        filters: number of learned filters; with `groups` a multiple of groups / 8.
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
        index = torch.stack(views, 1).flatten(2, 4).flatten(0, 1)
        index = index.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)  # each group's together
        self.register_buffer("index", index, persistent=False)

    def kernels(self):
        """Returns the filters in all poses, float32 (8 * filters, poses * in_filters, size, size)."""
        return self.weight.flatten()[self.index]

    def forward(self, images):
        output = F.conv2d(images, self.kernels(), None, self.stride, self.padding, groups=self.groups)
        return output.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU


class Model_3(nn.Sequential):
    """Advanced digit classifier, 4,506 parameters: a pose first, then filters that share weights.

    Takes normalised images, float32 (N, 1, 28, 28), and returns logits, float32 (N, 10).
    Batch normalisation: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015. Layer normalisation:
    J. L. Ba et al., arXiv:1607.06450.
    """

    def __init__(self):
        super().__init__(  # input: 1 x 28 x 28; then each output, and the parameters where there are any
            Upright(),  # 1 x 28 x 28
            SymmetricConv2d(1, 2, 5, stride=2, padding=2, poses=1),  # 16 x 14 x 14; 50
            nn.BatchNorm2d(16),  # 32
            nn.ReLU(),
            SymmetricConv2d(2, 2, 3, padding=1),  # 16 x 14 x 14; 288
            nn.MaxPool2d(2),  # 16 x 7 x 7; at once, to leave what follows a quarter of the work
            nn.BatchNorm2d(16),  # 32
            nn.ReLU(),
            SymmetricConv2d(2, 4, 3, padding=1),  # 32 x 7 x 7; 576
            nn.BatchNorm2d(32),  # 64
            nn.ReLU(),
            SymmetricConv2d(4, 4, 3, padding=1),  # 32 x 7 x 7; 1,152
            nn.BatchNorm2d(32),  # 64
            nn.ReLU(),
            SymmetricConv2d(4, 4, 3, padding=1),  # 32 x 7 x 7; 1,152
            nn.BatchNorm2d(32),  # 64
            nn.ReLU(),
            SymmetricConv2d(1, 8, 7, groups=32, poses=1),  # 64 x 1 x 1; 392: two places for each feature
            nn.Flatten(),  # 64
            nn.LayerNorm(64, elementwise_affine=False),
            nn.ReLU(),
            nn.Dropout(0.1),  # here, where a feature is a single number: no digit may hang on one of them
            nn.Linear(64, 10, bias=False),  # 640
        )
