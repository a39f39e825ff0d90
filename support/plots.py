"""Plots of training curves and model predictions (requires matplotlib)."""

import io

import torch
from torch import nn

from models.layers import P4MConv2d
from support.files import create_directory, write
from support.process import RunError

BLUE, ORANGE = "#0072B2", "#D55E00"  # color-blind safe: M. Okabe, K. Ito, 2008


def prepare(folder):
    """Creates the directory of the plots. Raises RunError if matplotlib does not work."""
    try:
        draw_png(lambda fig, axes: None)
    except Exception as error:  # a broken installation or style file may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RunError(f"--plot requires matplotlib (pip install matplotlib): {reason}") from error
    create_directory(folder)


def draw_png(draw, rows=1, columns=1, size=(5.2, 5)):
    """Creates a figure of `size` inches, calls `draw(fig, axes)` and returns it as the bytes of a PNG file.

    The user's own matplotlibrc is ignored. `axes` is an array (rows, columns).
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        fig = Figure(size, dpi=100, layout="constrained")
        draw(fig, fig.subplots(rows, columns, squeeze=False))
        content = io.BytesIO()
        fig.savefig(content, format="png", pil_kwargs={"optimize": True})
    return content.getvalue()


def save(path, *arguments, **options):
    """Writes a figure to a PNG file, with the other arguments of `draw_png`; returns the path."""
    write(draw_png(*arguments, **options), path)
    return path


def curves(history, best_epoch, path):
    """Plots loss and accuracy over the epochs of a run.

    Args:
        history: list of dicts, one per epoch: see `TrainingState.METRICS`.
        best_epoch: the epoch, from 1, whose weights were saved.
        path: PNG file to write; returned.
    """
    epochs = range(1, len(history) + 1)
    lowered = [epoch for epoch in epochs[1:] if history[epoch - 1]["lr"] < history[epoch - 2]["lr"]]

    def draw(fig, axes):
        for ax, metric, unit, title in zip(axes[0], ("loss", "accuracy"), (1, 100), ("Loss", "Accuracy (%)")):
            for name, color, style in ("training", ORANGE, "o--"), ("validation", BLUE, "o-"):
                values = [unit * epoch[f"{name}_{metric}"] for epoch in history]
                ax.plot(epochs, values, style, color=color, markersize=3, label=name)
            ax.plot(best_epoch, values[best_epoch - 1], "*", color=BLUE, markersize=14, label="saved")
            for index, epoch in enumerate(lowered):
                label = "_" * bool(index) + "learning rate lowered"  # in the legend once
                ax.axvline(epoch - 0.5, color="gray", linestyle=":", label=label)
            ax.set(title=title, xlabel="Epoch", xlim=(0.5, len(history) + 0.5))
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.3)
        axes[0, 1].legend(loc="lower right", framealpha=1)

    return save(path, draw, columns=2, size=(9, 3.6))


def grid(images, path, titles=None, columns=8, heading=None, inches=1.1, **options):
    """Plots images (N, H, W), each this many inches wide, with titles and a heading; returns the path."""
    rows = -(-len(images) // columns)
    titles = titles or [""] * len(images)
    height = inches * rows + 0.25 * rows * any(titles) + 0.4 * bool(heading)

    def draw(fig, axes):
        for ax in axes.flat:
            ax.axis("off")
        for ax, image, title in zip(axes.flat, images, titles):
            ax.imshow(image.detach().cpu().numpy(), **{"cmap": "gray_r"} | options)
            ax.set_title(title, fontsize=9)
        fig.suptitle(heading)

    return save(path, draw, rows, columns, (inches * columns, height))


def confusion(predictions, labels, path):
    """Plots a confusion matrix of predictions and labels, int64 (N,); returns the path."""
    counts = torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)
    errors = counts - counts.diag().diag()

    def draw(fig, axes):
        ax = axes[0, 0]
        ax.imshow(errors.numpy(), cmap="Blues", vmax=max(1, 1.5 * int(errors.max())))
        for label, prediction in counts.nonzero().tolist():
            text = f"{int(counts[label, prediction])}"
            ax.text(prediction, label, text, ha="center", va="center", fontsize=9)
        ax.set(xticks=range(10), yticks=range(10), xlabel="Prediction", ylabel="Label")
        ax.set_title(f"{int(errors.sum())} errors in {len(labels):,} images")

    return save(path, draw)


def evaluation(models, images, probabilities, labels, folder):
    """Plots the confusion matrix, the most confident errors and the filters of the first layer.

    Args:
        models: in evaluation mode, on any device. The tensors are on the CPU.
        images: normalized, float32 (N, 1, 28, 28).
        probabilities: the predictions of the models' ensemble, float32 (N, 10).
        labels: int64 (N,).
        folder: directory for the PNG files; their paths are returned.
    """
    confidences, predictions = probabilities.max(1)
    paths = [confusion(predictions, labels, folder / "confusion.png")]

    wrong = (predictions != labels).nonzero()[:, 0]
    wrong = wrong[confidences[wrong].argsort(descending=True)][:24]
    titles = [f"{labels[i]} as {predictions[i]}, {confidences[i]:.0%}" for i in wrong.tolist()]
    if titles:
        paths.append(grid(images[wrong, 0], folder / "mistakes.png", titles))

    layers = [layer for layer in models[0].modules() if isinstance(layer, (nn.Conv2d, P4MConv2d))]
    if layers:
        filters = layers[0].kernels() if isinstance(layers[0], P4MConv2d) else layers[0].weight
        filters, heading = filters[:, 0].detach().cpu(), f"First-layer filters of {type(models[0]).__name__}"
        limit = filters.abs().max().item()
        options = {"heading": heading, "cmap": "PuOr", "vmin": -limit, "vmax": limit}
        paths.append(grid(filters, folder / "filters.png", **options))
    return paths
