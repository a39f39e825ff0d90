"""What a model says of a whole data set, and how much of it is right."""

import statistics

import torch


@torch.no_grad()
def predict(model, loader):
    """Returns the logits, float32 (N, 10), of all images of a loader that goes in order, and their labels.

    The model is left in evaluation mode.
    """
    model.eval()
    return torch.cat([model(images) for images, _ in loader]), loader.dataset.tensors[1]


def accuracy(logits, labels):
    """Returns the fraction of rows of (N, 10) whose largest value stands at the label, int64 (N,)."""
    return float((logits.argmax(1) == labels).sum() / len(labels))


@torch.no_grad()
def vote(models, images):
    """Returns the mean softmax output of models for images on their device: float32 (N, 10), on the CPU."""
    return torch.stack([model(images).softmax(1) for model in models]).mean(0).cpu()


def print_runs(name, results):
    """Prints how the runs of a model vary, and what they score together.

    Args:
        results: for each run's name its accuracies on validation and on test images, its logits of the test
            images, float32 (N, 10), and their labels, int64 (N,).
    """
    validations, tests, logits, labels = zip(*results.values())
    print(f"\n{name:12}{'Validation':18}Test")
    for run, validation, test in zip(results, validations, tests):
        print(f"{run:12}{validation:<18.2%}{test:.2%}")
    spreads = [f"{statistics.mean(x):.2%} ± {statistics.stdev(x):.2%}" for x in (validations, tests)]
    print(f"{'mean ± sd':12}{spreads[0]:18}{spreads[1]}")
    print(f"{'lowest':12}{min(validations):<18.2%}{min(tests):.2%}")
    print(f"{'ensemble':30}{accuracy(torch.stack(logits).softmax(2).mean(0), labels[0]):.2%}")
