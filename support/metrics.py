"""Predictions, metrics and ensembles, and what is printed about them."""

import contextlib
import io
import statistics
from typing import NamedTuple

import torch
from torchsummary import summary


class RunResult(NamedTuple):
    """What a training run has reached with the weights that it keeps."""

    validation_accuracy: float  # a fraction
    test_accuracy: float  # a fraction
    logits: torch.Tensor  # of the test images, float32 (N, 10), on the CPU
    labels: torch.Tensor  # of the test images, int64 (N,), on the CPU


@torch.no_grad()
def predict(model, loader):
    """Returns the logits, float32 (N, 10), and the labels, int64 (N,), of all images of a loader, on the CPU.

    The model is left in evaluation mode. Raises FloatingPointError if a logit is not finite.
    """
    model.eval()
    logits = []
    labels = []
    for images, targets in loader:
        logits.append(model(images))
        labels.append(targets)
    logits = torch.cat(logits).cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: if it is in training, try a lower --lr")
    return logits, torch.cat(labels).cpu()


def accuracy(scores, labels):
    """Returns the top-1 accuracy, a fraction, of logits or probabilities (N, 10) for labels (N,)."""
    return int((scores.argmax(1) == labels).sum()) / len(labels)


def ensemble_probabilities(logits):
    """Returns the mean softmax output, float32 (N, 10), of several models, given the logits of each."""
    return torch.stack(list(logits)).softmax(2).mean(0)


def print_summary(model_class):
    """Prints torchsummary's table of layers, if it can show the model, and the number of parameters."""
    table = io.StringIO()
    model = model_class().eval()
    with contextlib.redirect_stdout(table), contextlib.suppress(Exception):  # it fails for LSTMs, for one
        summary(model, (1, 28, 28), device="cpu")
    layers, *_ = table.getvalue().partition("Total params")  # which counts shared parameters twice
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{layers}Parameters: {parameters:,}\n")


def print_epoch(state, epochs):
    """Prints the metrics of the last of `epochs` epochs of a `TrainingState`, and a lowered learning rate."""
    metrics = state.history[-1]
    print(f"Epoch: {len(state.history)}/{epochs}")
    print(f"Training Loss: {metrics['training_loss']:.3f}")
    print(f"Training Accuracy: {metrics['training_accuracy']:.2%}")
    print(f"Validation Accuracy: {metrics['validation_accuracy']:.2%}")
    print("-" * 50)
    lr = state.optimizer.param_groups[0]["lr"]
    if lr < metrics["lr"]:
        print(f"Learning rate lowered to {lr:g}")


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
        results: dict from each run's name to its `RunResult`.
    """
    width = max(map(len, [*results, "mean ± sd"])) + 3
    validations = [result.validation_accuracy for result in results.values()]
    tests = [result.test_accuracy for result in results.values()]
    print(f"\n{name:{width}}{'Validation':18}Test")
    for run, result in results.items():
        print(f"{run:{width}}{result.validation_accuracy:<18.2%}{result.test_accuracy:.2%}")
    validation = f"{statistics.mean(validations):.2%} ± {statistics.stdev(validations):.2%}"
    test = f"{statistics.mean(tests):.2%} ± {statistics.stdev(tests):.2%}"
    print(f"{'mean ± sd':{width}}{validation:18}{test}")
    print(f"{'lowest':{width}}{min(validations):<18.2%}{min(tests):.2%}")
    ensemble = ensemble_probabilities(result.logits for result in results.values())
    labels = next(iter(results.values())).labels
    print(f"{'ensemble':{width + 18}}{accuracy(ensemble, labels):.2%}")
