"""Scores trained files whose weights are rounded to a few bits, without further training.

    python tests/measure/quantization.py runs/best_Model_3_seed*.pth

Each filter has a scale of its own. Scales, and batch normalization's scale and shift, have half precision.
The arithmetic stays that of float32.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.metrics import accuracy, predict  # noqa: E402


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    paths = parser.parse_args().checkpoints
    loader, _ = datafile.get_test_loader()
    for bits in None, 8, 6, 5, 4:
        accuracies = []
        for path in paths:
            model = checkpoint.load(path)
            size = quantize(model, bits) if bits else 4 * sum(p.numel() for p in model.parameters())
            accuracies.append(accuracy(*predict(model, loader)))
        spread = f" ± {statistics.stdev(accuracies):.3%}" if len(paths) > 1 else ""
        mean = f"{statistics.mean(accuracies):.3%}{spread}"
        print(f"{bits or 32} bits, {size / 1000:.1f} kB: {mean} (lowest {min(accuracies):.2%})", flush=True)


if __name__ == "__main__":
    main()
