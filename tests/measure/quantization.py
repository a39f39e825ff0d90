"""Scores trained files whose weights are rounded to a few bits.

    python tests/measure/quantization.py runs/best_Model_3_seed*.pth

Each filter has a scale of its own. Scales, and batch normalization's scale and shift, have half precision.
The arithmetic stays that of float32. The last row is after two more epochs, whose forward passes use rounded
weights while the optimizer changes the weights before rounding (Y. Bengio et al., "Estimating or propagating
gradients through stochastic neurons", arXiv:1308.3432, 2013): half a minute for each file.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
import train  # noqa: E402
from support import checkpoint  # noqa: E402
from support.metrics import accuracy, predict  # noqa: E402

LR = 0.003  # of the training through the rounding, chosen on the validation set


def round_filters(weight, bits):
    """Rounds a weight (filters, ...) to integers of some bits, times a scale for each filter.

    The scale is the one with the smallest squared error among forty. Returns the rounded weight.
    """
    filters = weight.flatten(1)
    highest = 2 ** (bits - 1) - 1
    best = torch.zeros_like(filters)
    error = torch.full((len(filters),), torch.inf)
    for share in torch.linspace(0.5, 1, 40):
        scale = (share * filters.abs().amax(1, keepdim=True) / highest).half().float()
        rounded = (filters / scale).round().clamp(-highest - 1, highest) * scale
        squared = (rounded - filters).square().sum(1)
        best[squared < error] = rounded[squared < error]
        error = error.minimum(squared)
    return best.view_as(weight)


@torch.no_grad()
def quantize(model, bits):
    """Rounds the weights of a model in place; returns the number of bytes that they need."""
    size = 0
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            layer.bias.copy_((layer.bias - layer.running_mean * scale).half())
            layer.weight.copy_(scale.half())
            layer.running_mean.zero_()
            layer.running_var.fill_(1 - layer.eps)
            size += 2 * 2 * len(scale)
        elif isinstance(getattr(layer, "weight", None), nn.Parameter):
            layer.weight.copy_(round_filters(layer.weight, bits))
            size += layer.weight.numel() * bits / 8 + 2 * len(layer.weight)
            if getattr(layer, "bias", None) is not None:
                layer.bias.copy_(layer.bias.half())
                size += 2 * len(layer.bias)
    return size


class Rounding(nn.Module):
    """Rounds a weight to 4 bits; its gradient is passed on as if it were not rounded."""

    def forward(self, weight):
        return weight + (round_filters(weight.detach(), 4) - weight.detach())


def train_rounded(model, loader, lr=LR):
    """Returns a model after two epochs of training through the rounding to 4 bits."""
    model = copy.deepcopy(model)
    for layer in model:
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() > 1:  # batch normalization is not rounded
            parametrize.register_parametrization(layer, "weight", Rounding())
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for epoch in 1, 2:
        train.train_epoch(model, average, loader, optimizer, epoch)
    for layer in average:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return average.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    paths = parser.parse_args().checkpoints
    loaders = datafile.get_loaders(upstrokes=True)
    torch.manual_seed(0)
    for bits, trained in (None, False), (8, False), (6, False), (5, False), (4, False), (4, True):
        accuracies = []
        for path in paths:
            model = checkpoint.load(path)
            if trained:
                model = train_rounded(model, loaders.train)
            size = quantize(model, bits) if bits else 4 * sum(p.numel() for p in model.parameters())
            accuracies.append(accuracy(*predict(model, loaders.test)))
        name = f"{bits or 32} bits{', trained' if trained else ''}, {size / 1000:.1f} kB"
        spread = f" ± {statistics.stdev(accuracies):.3%}" if len(paths) > 1 else ""
        print(f"{name}: {statistics.mean(accuracies):.3%}{spread} (lowest {min(accuracies):.2%})", flush=True)


if __name__ == "__main__":
    main()
