import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Sequential):
    """An `nn.Sequential` that checks its input: AssertionError unless its shape is (N, 1, 28, 28)."""

    def forward(self, images):
        torch._assert(  # unlike `if`, works with torch.export, torch.compile and torch.fx
            images.shape[1:] == (1, 28, 28),
            f"{type(self).__name__} takes images of shape (N, 1, 28, 28), not {images.shape}",
        )
        return super().forward(images)

    def __getitem__(self, index):
        """Returns a layer, or, for a slice, an `nn.Sequential`: the models' classes take no layers."""
        return nn.Sequential(*self)[index]


class Deskew(nn.Module):
    """Normalizes each digit: centers it, removes its slant and evens out its size.

    The layer has no parameters; the transform is computed from image moments. The digit is shifted by its
    centroid, sheared by the regression of x on y, and scaled in height and width: each standard deviation is
    moved halfway, on a logarithmic scale, to its target, `HEIGHT` or `WIDTH`. After
    C.-L. Liu et al., "Handwritten digit recognition: investigation of normalization and feature extraction
    techniques", Pattern Recognition 37(2), 2004.

    Takes images (N, 1, 28, 28) of any real dtype and value range: the minimum of each image is background
    and its maximum ink; an image with a range below 0.001 is amplified less.
    Returns (N, 1, 28, 28) in the module's own dtype, 0 for background and `INK` for ink.
    """

    INK = 3.25  # scales the pixels of an average image to unit standard deviation
    # Target standard deviations, in units of half the image side: 1.4 times those of an average digit.
    WIDTH, HEIGHT = 0.36, 0.54

    def __init__(self):
        super().__init__()
        centers = (torch.arange(28) + 0.5) / 14 - 1  # of the pixels, from -1 to 1
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        monomials = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).flatten(1)
        self.register_buffer("monomials", monomials, persistent=False)
        # The same centers, computed as in `affine_grid`, which is ten times slower on the CPU.
        self.register_buffer("axis", torch.linspace(-1, 1, 28) * 27 / 28, persistent=False)

    def forward(self, images):
        images = images.to(self.axis.dtype)
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        ink = (images - low) * (self.INK / (high - low).clamp(min=1e-3))
        moments = F.linear(ink.flatten(1), self.monomials)
        means = (moments[:, 1:] / moments[:, :1].clamp(min=1e-3))[:, :, None, None]
        x, y, xx, xy, yy = means.unbind(1)
        variance_x = xx - x * x
        covariance = xy - x * y
        variance_y = (yy - y * y).clamp(min=1e-3)
        slant = covariance / variance_y
        height = (variance_y.sqrt() / self.HEIGHT).sqrt()
        width = ((variance_x - slant * covariance).clamp(min=1e-2).sqrt() / self.WIDTH).sqrt()
        right = self.axis
        down = self.axis[:, None]
        sample_x = width * right + (slant * height * down + x)
        sample_y = (height * down + y).expand_as(sample_x)
        # Stacked as two planes and permuted: faster on the CPU than interleaved (x, y) pairs.
        grid = torch.stack([sample_x, sample_y]).permute(1, 2, 3, 0)
        return F.grid_sample(ink, grid, align_corners=False)


def orient(filters):
    """Returns filters in eight orientations: four rotations, and the four of their mirror images.

    If the input channels are orientations, they are permuted along with the rotation. This makes a
    convolution with stride 1 equivariant: rotating or mirroring the input rotates or mirrors the output and
    permutes its channels. The group is p4m of T. Cohen, M. Welling, "Group equivariant convolutional
    networks", ICML 2016.

    Takes (F, C, mirrors, turns, K, K), where (mirrors, turns) is (2, 4), or (1, 1) for plain images.
    Returns (8 * F, C * mirrors * turns, K, K); the orientations of a filter are adjacent.
    """
    views = []
    for view in filters, filters.flip(-1, 2, 3).roll(1, 3):
        for _ in range(4):
            views.append(view)
            view = view.rot90(1, (-2, -1)).roll(1, 3)
    return torch.stack(views, 1).flatten(2, 4).flatten(0, 1)


class P4MConv2d(nn.Module):
    """A convolution without bias that applies each learned filter in eight orientations (see `orient`).

    Each learned filter yields eight output channels.
    Takes float32 (N, orientations * in_filters, H, W), returns float32 (N, 8 * filters, H', W').

    Args:
        in_filters: number of input filters; 1 for plain images.
        filters: number of learned filters.
        kernel_size, stride, padding: as in `nn.Conv2d`.
        orientations: orientations of each input filter: 8, or 1 for plain images.
    """

    def __init__(self, in_filters, filters, kernel_size, stride=1, padding=0, orientations=8):
        super().__init__()
        mirrors, turns = (2, 4) if orientations == 8 else (1, 1)
        self.weight = nn.Parameter(torch.empty(filters, in_filters, mirrors, turns, kernel_size, kernel_size))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.stride, self.padding = stride, padding
        # Index of the weight at each kernel position, in channels_last order, which is faster on the CPU.
        index = orient(torch.arange(self.weight.numel()).view_as(self.weight)).permute(0, 2, 3, 1)
        self.shape = index.shape
        self.register_buffer("index", index.flatten(), persistent=False)

    def forward(self, images):
        kernels = self.weight.flatten().index_select(0, self.index).view(self.shape).permute(0, 3, 1, 2)
        return F.conv2d(images, kernels, None, self.stride, self.padding)


class P4MReadout(nn.Module):
    """A depthwise convolution without bias whose kernels cover the whole image (output 1 x 1).

    Each kernel has the orientation of its channel (see `orient`). As one batched matrix product with
    mostly-zero matrices, it is ten times faster with AVX2 than as a convolution.

    Takes float32 (N, 8 * in_filters, size, size), returns float32 (N, 8 * in_filters * outputs, 1, 1).

    Args:
        in_filters: number of input filters.
        outputs: outputs per channel.
        size: image size in pixels.
    """

    def __init__(self, in_filters, outputs, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs * in_filters, 1, 1, 1, size, size))
        nn.init.normal_(self.weight, std=1 / size)
        self.shape = in_filters, 8 * outputs, size * size, 1
        index = orient(torch.arange(self.weight.numel()).view_as(self.weight)).flatten(1)
        # The outputs of a channel are adjacent.
        index = index.unflatten(0, (outputs, -1)).transpose(0, 1).flatten()
        self.register_buffer("index", index, persistent=False)
        own_channel = torch.eye(8).repeat_interleave(outputs, 0)[:, None]
        self.register_buffer("own_channel", own_channel, persistent=False)  # (8 * outputs, 1, 8)

    def forward(self, images):
        kernels = self.weight.flatten().index_select(0, self.index).view(self.shape)
        matrices = (kernels * self.own_channel).flatten(2)
        images = images.permute(0, 2, 3, 1).unflatten(3, (-1, 8))  # so that the gradient is channels_last
        images = images.permute(3, 0, 1, 2, 4).flatten(2)  # (in_filters, N, size * size * 8)
        return (images @ matrices.mT).transpose(0, 1).flatten(1)[:, :, None, None]
