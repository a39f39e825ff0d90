"""Plots of training curves and model predictions (requires matplotlib)."""

import contextlib
import io
import math

import torch

from support.exits import RunError
from support.files import create_directory, write_atomically

BLUE, ORANGE = "#0072B2", "#D55E00"  # color-blind safe: M. Okabe, K. Ito, 2008


@contextlib.contextmanager
def default_style(failure):
    """Ignores the user's own matplotlibrc within the block; turns any error into RunError."""
    try:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            yield
    except Exception as error:  # a broken installation, style file or font may raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise RunError(f"{failure}: {reason}") from error


def prepare(folder):
    """Creates the directory of the plots. Raises RunError if that fails or matplotlib cannot be imported."""
    with default_style("--plot requires matplotlib (pip install matplotlib)"):
        from matplotlib.figure import Figure  # noqa: F401
    create_directory(folder)


def save(path, plot, *arguments, **options):
    """Writes the figure that `plot(*arguments, **options)` returns to a PNG file; replaces an existing file.

    Raises RunError if the figure cannot be drawn or written.
    """
    content = io.BytesIO()
    with default_style(f"{path} cannot be drawn"):
        plot(*arguments, **options).savefig(content)
    write_atomically(path, content.getvalue())
    print(f"See {path}")


def new_figure(width, height, rows=1, columns=1):
    """Returns a figure of this size in inches, and its axes, an array (rows, columns)."""
    from matplotlib.figure import Figure

    fig = Figure((width, height), dpi=100, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def curves(history, kept_epoch):
    """Plots loss and accuracy over the epochs of a run; returns the figure.

    Args:
        history: list of dicts, one per epoch, as in `TrainingState`.
        kept_epoch: the epoch, from 1, whose weights are kept.
    """
    fig, axes = new_figure(9, 3.6, columns=2)
    epochs = range(1, len(history) + 1)
    lowered = [epoch for epoch in epochs[1:] if history[epoch - 1]["lr"] < history[epoch - 2]["lr"]]
    panels = (axes[0, 0], "loss", 1, "Loss"), (axes[0, 1], "accuracy", 100, "Accuracy (%)")
    for ax, metric, unit, title in panels:
        for name, color, style in ("training", ORANGE, "o--"), ("validation", BLUE, "o-"):
            values = [unit * epoch[f"{name}_{metric}"] for epoch in history]
            ax.plot(epochs, values, style, color=color, markersize=3, label=name)
        ax.plot(kept_epoch, values[kept_epoch - 1], "*", color=BLUE, markersize=14, label="saved")
        for epoch in lowered:
            label = "learning rate lowered" if epoch == lowered[0] else None  # in the legend once
            ax.axvline(epoch - 0.5, color="gray", linestyle=":", label=label)
        ax.set(title=title, xlabel="Epoch", xlim=(0.5, len(history) + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0, 1].legend(loc="lower right", framealpha=1)
    return fig


def grid(images, titles):
    """Plots images (N, H, W), eight a row, each with a title; returns the figure."""
    rows = math.ceil(len(images) / 8)
    fig, axes = new_figure(8.8, 1.35 * rows, rows, 8)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles):
        ax.imshow(image.numpy(), cmap="gray_r")
        ax.set_title(title, fontsize=9)
    return fig


def confusion(predictions, labels):
    """Plots a confusion matrix of predictions and labels, int64 (N,); returns the figure."""
    fig, axes = new_figure(5.2, 5)
    ax = axes[0, 0]
    counts = torch.bincount(10 * labels + predictions, minlength=100).view(10, 10)
    errors = counts - counts.diag().diag()
    ax.imshow(errors.numpy(), cmap="Blues", vmax=max(1, 1.5 * int(errors.max())))
    for label, prediction in counts.nonzero().tolist():
        text = str(int(counts[label, prediction]))
        ax.text(prediction, label, text, ha="center", va="center", fontsize=9)
    ax.set(xticks=range(10), yticks=range(10), xlabel="Prediction", ylabel="Label")
    ax.set_title(f"{int(errors.sum())} errors in {len(labels):,} images")
    return fig


def save_evaluation(images, probabilities, labels, folder):
    """Saves `confusion.png` and, if there are errors, `mistakes.png`: up to 24, the most confident first.

    Args:
        images: normalized, float32 (N, 1, 28, 28). All tensors are on the CPU.
        probabilities: predictions, float32 (N, 10).
        labels: int64 (N,).
        folder: directory for the PNG files. A `mistakes.png` of an earlier evaluation does not stay.
    """
    confidences, predictions = probabilities.max(1)
    save(folder / "confusion.png", confusion, predictions, labels)

    wrong = (predictions != labels).nonzero()[:, 0]
    wrong = wrong[confidences[wrong].argsort(descending=True)][:24]
    titles = [f"{labels[i]} as {predictions[i]}, {confidences[i]:.0%}" for i in wrong.tolist()]
    if titles:
        save(folder / "mistakes.png", grid, images[wrong, 0], titles)
    else:
        (folder / "mistakes.png").unlink(missing_ok=True)
