"""Pictures of a training and of what models see, drawn with matplotlib, which nothing else here needs."""

import copy

import torch
from torch import nn

from models.layers import P4MConv2d

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind eyes: M. Okabe, K. Ito, 2008


class PlotError(Exception):
    """matplotlib is missing, or does not work."""


def check_matplotlib():
    """Raises PlotError, saying what to do, where matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            raise PlotError("--plot needs matplotlib: pip install matplotlib") from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise PlotError(f"--plot needs matplotlib, which fails: {reason}") from error


def figure(rows, columns, size, **options):
    """Returns a figure of (width, height) inches and its axes."""
    from matplotlib.figure import Figure

    drawing = Figure(size, dpi=100, layout="constrained")
    return drawing, drawing.subplots(rows, columns, **options)


def save(drawing, path):
    drawing.savefig(path, pil_kwargs={"optimize": True})
    return path


def curves(history, best_epoch, path):
    """Draws loss and accuracy over the epochs of a run.

    Args:
        history: a dict an epoch, of "lr", "training_loss", "training_accuracy", "validation_loss" and
            "validation_accuracy".
        best_epoch: the epoch, from 1, whose weights were kept.
        path: of the PNG file, which is returned.
    """
    epochs = range(1, len(history) + 1)
    drawing, axes = figure(1, 2, (9, 3.6))
    for axis, column, unit, title in zip(axes, ("loss", "accuracy"), (1, 100), ("Loss", "Accuracy (%)")):
        for kind, options in (
            ("training", {"color": ORANGE, "linestyle": "--"}),
            ("validation", {"color": BLUE}),
        ):
            values = [unit * epoch[f"{kind}_{column}"] for epoch in history]
            axis.plot(epochs, values, marker="o", markersize=3, label=kind, **options)
        axis.plot(best_epoch, values[best_epoch - 1], "*", color=BLUE, markersize=14, label="kept")
        label = "learning rate lowered"
        for epoch in epochs[1:]:
            if history[epoch - 1]["lr"] < history[epoch - 2]["lr"]:
                axis.axvline(epoch - 0.5, color="grey", linestyle=":", label=label)
                label = None  # once is enough
        axis.set(title=title, xlabel="Epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", framealpha=1)
    return save(drawing, path)


def grid(images, path, titles=None, columns=8, heading=None, size=1.1, **options):
    """Draws images (N, H, W) of `size` inches, with titles and a heading; returns the path."""
    rows = -(-len(images) // columns)
    titles = titles or [""] * len(images)
    height = size * rows + 0.25 * rows * any(titles) + 0.4 * bool(heading)
    drawing, axes = figure(rows, columns, (size * columns, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image.detach().cpu().numpy(), **{"cmap": "gray_r"} | options)
        axis.set_title(title, fontsize=9)
    drawing.suptitle(heading)
    return save(drawing, path)


def confusion(guesses, labels, path):
    """Draws how often each digit (int64 (N,)) was taken for which; returns the path."""
    counts = torch.bincount(10 * labels + guesses, minlength=100).view(10, 10)
    mistakes = counts - counts.diag().diag()
    drawing, axis = figure(1, 1, (5.2, 5))
    axis.imshow(mistakes.numpy(), cmap="Blues", vmax=max(1, 1.5 * int(mistakes.max())))
    for label in range(10):
        for guess in range(10):
            if count := int(counts[label, guess]):
                axis.text(guess, label, f"{count}", ha="center", va="center", fontsize=9)
    axis.set(xticks=range(10), yticks=range(10), xlabel="Guess", ylabel="Label")
    axis.set_title(f"{int(mistakes.sum())} mistakes in {len(labels):,} images")
    return save(drawing, path)


def saliency(models, images, digits):
    """Returns how much each pixel moves the logit of a digit: the size of the gradient, (N, 28, 28).

    K. Simonyan et al., "Deep inside convolutional networks", arXiv:1312.6034. All is on the CPU, as not every
    device can differentiate what `Deskew` does.
    """
    images = images.clone().requires_grad_()
    logits = sum(copy.deepcopy(model).cpu()(images) for model in models)
    logits.gather(1, digits[:, None]).sum().backward()
    return images.grad[:, 0].abs()


def evaluation(models, images, probabilities, labels, folder):
    """Draws what models do on labelled images.

    Args:
        models: they are in evaluation mode, on any device; what follows is on the CPU.
        images: normalised, float32 (N, 1, 28, 28).
        probabilities: what the models together say, float32 (N, 10).
        labels: int64 (N,).
        folder: where the PNG files go; their paths are returned.
    """
    confidences, guesses = probabilities.max(1)
    paths = [confusion(guesses, labels, folder / "confusion.png")]

    wrong = (guesses != labels).nonzero()[:, 0]
    wrong = wrong[confidences[wrong].argsort(descending=True)][:24]
    titles = [f"{labels[i]} as {guesses[i]}, {confidences[i]:.0%}" for i in wrong.tolist()]
    if titles:
        paths.append(grid(images[wrong, 0], folder / "mistakes.png", titles))

    layers = [layer for layer in models[0].modules() if isinstance(layer, (nn.Conv2d, P4MConv2d))]
    if layers:
        kernels = (
            (layers[0].kernels() if isinstance(layers[0], P4MConv2d) else layers[0].weight)[:, 0]
            .detach()
            .cpu()
        )
        limit, heading = kernels.abs().max().item(), f"First-layer filters of {type(models[0]).__name__}"
        colours = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
        paths.append(grid(kernels, folder / "filters.png", heading=heading, **colours))

    digits = labels.unique()
    examples = torch.stack([images[labels == digit][0] for digit in digits])
    pictures = torch.cat([examples[:, 0], saliency(models, examples, digits)])
    heading = "Digits, and the pixels that matter most for what they are taken for"
    return [*paths, grid(pictures, folder / "saliency.png", columns=len(digits), heading=heading)]
