"""Pictures of a training and of what models see, drawn with matplotlib, which nothing else here needs."""

import torch
from torch import nn

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind eyes: M. Okabe, K. Ito, 2008


def check_matplotlib():
    """Raises ImportError, saying what to install, where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error


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
        history: rows of learning rate, training loss and accuracy, validation loss and accuracy.
        best_epoch: the epoch, from 1, whose weights were kept.
        path: of the PNG file, which is returned.
    """
    rates, *columns = zip(*history, strict=True)
    epochs = range(1, len(rates) + 1)
    drawing, axes = figure(1, 2, (9, 3.6))
    percent = [[100 * value for value in column] for column in columns]
    for axis, training, validation, title in (
        (axes[0], columns[0], columns[2], "Loss"),
        (axes[1], percent[1], percent[3], "Accuracy (%)"),
    ):
        axis.plot(epochs, training, color=ORANGE, linestyle="--", marker="o", markersize=3, label="training")
        axis.plot(epochs, validation, color=BLUE, marker="o", markersize=3, label="validation")
        axis.plot(best_epoch, validation[best_epoch - 1], "*", color=BLUE, markersize=14, label="kept")
        drops = [epoch for epoch in epochs[1:] if rates[epoch - 1] < rates[epoch - 2]]
        for epoch in drops:
            label = "learning rate lowered" if epoch == drops[0] else None
            axis.axvline(epoch - 0.5, color="grey", linestyle=":", label=label)
        axis.set(title=title, xlabel="Epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", framealpha=1)
    return save(drawing, path)


def grid(images, titles, path, columns=8):
    """Draws images (N, 28, 28) side by side, each with its title; returns the path."""
    rows = -(-len(images) // columns)
    drawing, axes = figure(rows, columns, (1.1 * columns, 1.35 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.cpu(), cmap="gray_r")
        axis.set_title(title, fontsize=9)
    return save(drawing, path)


def confusion(guesses, labels, path):
    """Draws how often each digit (int64 (N,)) was taken for which; returns the path."""
    counts = torch.bincount(10 * labels + guesses, minlength=100).view(10, 10).cpu()
    mistakes = counts - counts.diag().diag()
    drawing, axis = figure(1, 1, (5.2, 5))
    axis.imshow(mistakes, cmap="Blues", vmax=max(1, 1.5 * int(mistakes.max())))
    for label in range(10):
        for guess in range(10):
            if count := int(counts[label, guess]):
                axis.text(guess, label, f"{count}", ha="center", va="center", fontsize=9)
    axis.set(xticks=range(10), yticks=range(10), xlabel="Guess", ylabel="Label")
    axis.set_title(f"{int(mistakes.sum())} mistakes in {len(labels):,} images")
    return save(drawing, path)


def saliency(models, image, guess):
    """Returns how much each pixel of an image (1, 28, 28) moves the logit of a guess: the gradient's size.

    K. Simonyan et al., "Deep inside convolutional networks", arXiv:1312.6034.
    """
    image = image[None].clone().requires_grad_()
    sum(model.eval()(image)[0, guess] for model in models).backward()
    return image.grad[0, 0].abs()


def evaluation(models, images, probabilities, labels, folder):
    """Draws what models do on labelled images.

    Args:
        models: they are in evaluation mode, on the device of the images.
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
    if len(wrong):
        paths.append(grid(images[wrong, 0], titles, folder / "mistakes.png"))

    first = next(layer for layer in models[0] if "Conv2d" in type(layer).__name__)
    kernels = first.weight if isinstance(first, nn.Conv2d) else first.kernels()
    drawing, axes = figure(2, -(-len(kernels) // 2), (0.6 * len(kernels), 2.6), squeeze=False)
    limit = kernels.abs().max().item()
    for axis in axes.flat:
        axis.axis("off")
    for axis, kernel in zip(axes.flat, kernels.detach().cpu(), strict=False):
        axis.imshow(kernel[0], cmap="PuOr", vmin=-limit, vmax=limit)
    drawing.suptitle(f"First-layer filters of {type(models[0]).__name__}")
    paths.append(save(drawing, folder / "filters.png"))

    drawing, axes = figure(2, 10, (10, 2.5))
    for digit in range(10):
        image = images[labels == digit][0]
        shown = image[0].cpu(), saliency(models, image, digit).cpu()
        for axis, picture, colours in zip(axes[:, digit], shown, ("gray_r", "Blues"), strict=True):
            axis.imshow(picture, cmap=colours)
            axis.axis("off")
    drawing.suptitle("Digits, and the pixels that matter most for what they are taken for")
    paths.append(save(drawing, folder / "saliency.png"))
    return paths
