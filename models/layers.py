import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Sequential):
    """Layers in a row that take images of 28 x 28 pixels, (N, 1, 28, 28): others raise AssertionError."""

    def forward(self, images):
        torch._assert(  # and not `if`: it can be exported, compiled and traced
            images.shape[1:] == (1, 28, 28),
            f"{type(self).__name__} takes images of shape (N, 1, 28, 28), not {images.shape}",
        )
        return super().forward(images)


class Deskew(nn.Module):
    """Brings each digit into a standard position: centred, without slant, of a more even size.

    Nothing here is learned; the position is read off the moments of the ink. The centre is its mean,
    the slant its regression of x on y, and its standard deviations, along y and across the slant, are
    moved halfway (on a logarithmic scale) to those of a digit that fills the image. After C.-L. Liu et al.,
    "Handwritten digit recognition: investigation of normalization and feature extraction
    techniques", Pattern Recognition 37(2), 2004.

    Takes images (N, 1, 28, 28) of any real dtype, scale, brightness and contrast: each image's smallest
    value is taken for paper, its largest for ink, and one whose values differ by less than 0.001 for blank.
    Returns (N, 1, 28, 28) in the module's own dtype, 0 for paper and `INK` for ink.
    """

    INK = 3.25  # with it the pixels of an average image have a standard deviation of 1
    WIDTH, HEIGHT = 0.36, 0.54  # standard deviations, half a side being 1: 1.4 times an average digit's

    def __init__(self):
        super().__init__()
        axis = (torch.arange(28) + 0.5) / 14 - 1  # the centres of the pixels, from -1 to 1
        y, x = (plane.flatten() for plane in torch.meshgrid(axis, axis, indexing="ij"))
        self.register_buffer("monomials", torch.stack([x**0, x, y, x * x, x * y, y * y]), persistent=False)
        # The same axis to the last bit as that of `affine_grid`, which takes ten times as long on a CPU.
        self.register_buffer("axis", torch.linspace(-1, 1, 28) * 27 / 28, persistent=False)

    def forward(self, images):
        images = images.to(self.axis.dtype)
        paper, full = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        ink = (images - paper) * (self.INK / (full - paper).clamp(min=1e-3))
        moments = F.linear(ink.flatten(1), self.monomials)
        x, y, xx, xy, yy = (moments[:, 1:] / moments[:, :1].clamp(min=1e-3)).unbind(1)
        xx, xy, yy = xx - x * x, xy - x * y, (yy - y * y).clamp(min=1e-3)
        x, y, xx, xy, yy = (moment[:, None, None] for moment in (x, y, xx, xy, yy))
        slant = xy / yy
        height = (yy.sqrt() / self.HEIGHT).sqrt()
        width = ((xx - slant * xy).clamp(min=1e-2).sqrt() / self.WIDTH).sqrt()
        right, down = self.axis, self.axis[:, None]
        x = width * right + (slant * height * down + x)
        y = (height * down + y).expand_as(x)
        # Two planes, not pairs of x and y, which take longer on a CPU.
        return F.grid_sample(ink, torch.stack([x, y]).permute(1, 2, 3, 0), align_corners=False)


def orient(filters):
    """Returns filters in eight orientations: four rotations, and the four of their mirror images.

    Where the slices of a filter are themselves orientations, they are permuted as the filter is turned, so
    that a convolution with the result is equivariant: an input turned or mirrored gives the same output
    turned or mirrored, its channels permuted. The group is p4m of T. Cohen, M. Welling, "Group equivariant
    convolutional networks", ICML 2016.

    Takes (F, C, mirrors, turns, K, K), the orientations of the C inputs being 2 x 4 or, for plain images,
    1 x 1; returns (8 * F, C * mirrors * turns, K, K), the orientations of a filter side by side.
    """
    views = []
    for view in filters, filters.flip(-1, 2, 3).roll(1, 3):
        for _ in range(4):
            views.append(view)
            view = view.rot90(1, (-2, -1)).roll(1, 3)
    return torch.stack(views, 1).flatten(2, 4).flatten(0, 1)


class P4MConv2d(nn.Module):
    """A convolution, without bias, that uses each learned filter in eight orientations (see `orient`).

    A stroke is a stroke whichever way it runs: one set of weights gives eight filters and eight channels.
    Takes float32 (N, orientations * in_filters, H, W), returns float32 (N, 8 * filters, H', W').

    Args:
        in_filters: number of the input's filters; 1 for plain images.
        filters: number of learned filters.
        kernel_size, stride, padding: as those of `nn.Conv2d`.
        orientations: those of the input's filters: 8, or 1 for plain images.
    """

    def __init__(self, in_filters, filters, kernel_size, stride=1, padding=0, orientations=8):
        super().__init__()
        mirrors, turns = (2, 4) if orientations == 8 else (1, 1)
        self.weight = nn.Parameter(torch.empty(filters, in_filters, mirrors, turns, kernel_size, kernel_size))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.stride, self.padding = stride, padding
        # Which weight stands where, its channel last: from there on all is channels_last, faster on a CPU.
        index = orient(torch.arange(self.weight.numel()).view_as(self.weight)).permute(0, 2, 3, 1)
        self.shape = index.shape
        self.register_buffer("index", index.flatten(), persistent=False)

    def kernels(self):
        """Returns the filters in all orientations: (8 * filters, orientations * in_filters, size, size)."""
        return self.weight.flatten().index_select(0, self.index).view(self.shape).permute(0, 3, 1, 2)

    def forward(self, images):
        return F.conv2d(images, self.kernels(), None, self.stride, self.padding)


class P4MReadout(nn.Module):
    """Reads each feature at learned places, each channel in its own orientation (see `orient`).

    It is a convolution without bias, of as many groups as there are channels, whose kernel is as large as
    the image; as a product for each feature, with a matrix that is mostly zeros, it takes a tenth of the
    time with AVX2.

    Takes float32 (N, 8 * features, size, size), returns float32 (N, 8 * features * places, 1, 1).

    Args:
        features: number of the input's filters.
        places: numbers that are read from each channel.
        size: of the image, in pixels.
    """

    def __init__(self, features, places, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places * features, 1, 1, 1, size, size))
        nn.init.normal_(self.weight, std=1 / size)
        self.shape = features, 8 * places, size * size, 1
        index = orient(torch.arange(self.weight.numel()).view_as(self.weight)).flatten(1)
        index = index.unflatten(0, (places, -1)).transpose(0, 1).flatten()  # a channel's side by side
        self.register_buffer("index", index, persistent=False)
        own_channel = torch.eye(8).repeat_interleave(places, 0)[:, None]
        self.register_buffer("own_channel", own_channel, persistent=False)  # (8 * places, 1, 8)

    def forward(self, images):
        kernels = self.weight.flatten().index_select(0, self.index).view(self.shape)
        matrices = (kernels * self.own_channel).flatten(2)
        images = images.permute(0, 2, 3, 1).unflatten(3, (-1, 8))  # so that the gradient is channels_last
        images = images.permute(3, 0, 1, 2, 4).flatten(2)  # (features, N, size * size * 8)
        return (images @ matrices.mT).transpose(0, 1).flatten(1)[:, :, None, None]
