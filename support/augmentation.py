"""Random deformations of training images."""

import functools
import math

import torch
from torch.nn.functional import grid_sample, interpolate

# Of the affine deformation, each drawn uniformly from both directions.
ROTATION = math.radians(12)
SCALE = 0.12  # of the width and of the height
SLANT = 0.15
SHIFT = 1  # pixels
ELASTICITY = 0.6  # standard deviation of the displacements of the control points, in pixels
# Of the upstrokes that `add_upstrokes` draws.
UPSTROKES = 0.15  # the share of the training 1s
LENGTH = 0.1, 0.65  # in heights of the digit
ANGLE = 25, 60  # degrees below the horizontal


@functools.cache
def grid_basis(device):
    """Returns the basis functions of `augment`'s sampling grids, float32 (28, 28 * 28).

    They are x and y from -1 to 1, the constant 1, and the bicubic weights of 5 x 5 control points.
    """
    axis = torch.linspace(-1, 1, 28, device=device) * 27 / 28  # the centers of the pixels
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.eye(5, device=device)[None, None]
    weights = interpolate(points, (5, 28), mode="bicubic", align_corners=True)[0, 0]
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), torch.kron(weights, weights)])


def augment(images, background):
    """Applies an independent random affine and elastic deformation to each image; labels stay valid.

    The affine part is a rotation, a scale in width and in height, a slant and a shift. The elastic part
    interpolates displacements of 5 x 5 control points, normally distributed in x and in y. Their strengths
    are at the top of this module. After P. Simard et al., "Best practices for convolutional neural networks
    applied to visual document analysis", ICDAR 2003.

    Args:
        images: float32 (N, 1, 28, 28). Random numbers come from the default generator of their device.
        background: the value of pixels that come from outside the image.

    Returns:
        float32 (N, 1, 28, 28).
    """
    draw = torch.rand(6, len(images), device=images.device) * 2 - 1
    angle = draw[0] * ROTATION
    width = 1 + draw[1] * SCALE
    height = 1 + draw[2] * SCALE
    slant = draw[3] * SLANT
    x = draw[4] * SHIFT / 14  # in units of half the image side
    y = draw[5] * SHIFT / 14
    cosine = angle.cos()
    sine = angle.sin()
    affine = torch.stack([width * cosine, width * (slant - sine), x, height * sine, height * cosine, y])
    elastic = torch.randn(2, len(images), 25, device=images.device) * (ELASTICITY / 14)
    # The grid as one matrix product: `affine_grid` and `interpolate` are much slower on the CPU.
    grid = torch.cat([affine.view(2, 3, -1).mT, elastic], 2) @ grid_basis(images.device)
    grid = grid.view(2, -1, 28, 28).permute(1, 2, 3, 0)
    return grid_sample(images - background, grid, align_corners=False).add_(background)


def add_upstrokes(ones, generator):
    """Draws a European-style upstroke on images of the digit 1.

    Such 1s are rare in MNIST; without them in training, models read them as 7s. The stroke runs from the top
    of the stem down to the left. It is as thick as the stem and slanted like it; `LENGTH` and `ANGLE` are the
    ranges that its length and its angle are drawn from, uniformly.

    Args:
        ones: uint8 (N, 28, 28).
        generator: CPU generator for the lengths and angles.

    Returns:
        uint8 (N, 28, 28).
    """
    ink = ones / 255
    mass = ink.sum((1, 2), keepdim=True).clamp(min=1)
    right = torch.arange(28)
    down = right[:, None]

    def mean(values):
        return (ink * values).sum((1, 2), keepdim=True) / mass

    x, y = right - mean(right), down - mean(down)
    slant = mean(x * y) / mean(y * y).clamp(min=1)  # of the stem, in pixels per row
    rows = (ink > 0.5).any(2, keepdim=True)
    height, top = rows.sum(1, keepdim=True), rows.int().argmax(1, keepdim=True)
    radius = mass / height.clamp(min=1) / (1 + slant**2).sqrt() / 2
    # Coordinates relative to the top of the stem, the start of the stroke.
    x, y = x - slant * (top + radius - mean(down)), down - top - radius
    draw = torch.rand(2, len(ones), 1, 1, generator=generator)
    length = height * (LENGTH[0] + (LENGTH[1] - LENGTH[0]) * draw[0])
    angle = torch.deg2rad(ANGLE[0] + (ANGLE[1] - ANGLE[0]) * draw[1])
    end_y = length * angle.sin()
    end_x = slant * end_y - length * angle.cos()
    along = ((x * end_x + y * end_y) / (end_x**2 + end_y**2).clamp(min=1)).clamp(0, 1)
    distance = torch.hypot(x - along * end_x, y - along * end_y)
    return ink.maximum((radius + 0.5 - distance).clamp(0, 1)).mul(255).round().byte()
