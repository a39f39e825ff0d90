"""Predictions, metrics and ensembles."""

import statistics

import torch


@torch.no_grad()
def predict(model, loader):
    """Returns the logits, float32 (N, 10), and the labels, int64 (N,), of all images of a loader, on the CPU.

    The model is left in evaluation mode.
    """
    model.eval()
    logits, labels = zip(*((model(images), labels) for images, labels in loader))
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def accuracy(scores, labels):
    """Returns the top-1 accuracy, a fraction, of logits or probabilities (N, 10) for labels (N,)."""
    return float((scores.argmax(1) == labels).sum() / len(labels))


def ensemble_probabilities(logits):
    """Returns the mean softmax output, float32 (N, 10), of several models, given the logits of each."""
    return torch.stack(list(logits)).softmax(2).mean(0)


def print_scores(title, probabilities, labels):
    """Prints the accuracy, the number of errors and the recall of each digit that occurs in the labels."""
    correct = probabilities.argmax(1) == labels
    print(f"{title}\nTest Accuracy: {accuracy(probabilities, labels):.2%} ({(~correct).sum()} errors)")
    recalls = [f"{digit}: {correct[labels == digit].float().mean():.2%}" for digit in labels.unique()]
    print("Recall: " + ", ".join(recalls))


def print_runs(name, results):
    """Prints a table of all runs, their mean and standard deviation, and the accuracy of their ensemble.

    Args:
        name: name of the model.
        results: dict from each run's name to its validation and test accuracy, the logits of the test
            images, float32 (N, 10), and their labels, int64 (N,).
    """
    validations, tests, logits, labels = zip(*results.values())
    print(f"\n{name:12}{'Validation':18}Test")
    for run, validation, test in zip(results, validations, tests):
        print(f"{run:12}{validation:<18.2%}{test:.2%}")
    means = [f"{statistics.mean(x):.2%} ± {statistics.stdev(x):.2%}" for x in (validations, tests)]
    print(f"{'mean ± sd':12}{means[0]:18}{means[1]}")
    print(f"{'lowest':12}{min(validations):<18.2%}{min(tests):.2%}")
    print(f"{'ensemble':30}{accuracy(ensemble_probabilities(logits), labels[0]):.2%}")
