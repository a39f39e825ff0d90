"""Metrics and printed figures against closed forms."""

import pytest
import torch

import evaluate
from support import metrics
from support.metrics import RunResult, accuracy, ensemble_probabilities, print_runs


def test_an_ensemble_is_the_mean_of_the_probabilities_and_not_of_the_logits():
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 1.5, 0.0]], [[0.0, 1.5, 0.0]]])
    expected = logits.softmax(2).mean(0)
    torch.testing.assert_close(ensemble_probabilities(list(logits)), expected)
    assert expected.argmax() == 1 and logits.mean(0).argmax() == 0


def test_accuracy_is_the_fraction_of_largest_scores_at_the_label():
    scores = torch.eye(10)[torch.tensor([3, 1, 4, 1, 5])]
    assert accuracy(scores, torch.tensor([3, 1, 4, 9, 9])) == pytest.approx(0.6)


def test_the_table_of_runs_has_each_accuracy_in_its_column(capsys):
    labels = torch.tensor([0, 1, 2, 3])
    right, wrong = torch.eye(10)[:4] * 5, torch.eye(10)[[9, 9, 2, 3]] * 2
    results = {"seed 0": RunResult(0.9, 0.8, right, labels), "seed 1": RunResult(0.7, 0.75, wrong, labels)}
    print_runs("Model_1", results)
    assert capsys.readouterr().out == (
        "\nModel_1     Validation        Test\n"
        "seed 0      90.00%            80.00%\n"
        "seed 1      70.00%            75.00%\n"
        "mean ± sd   80.00% ± 14.14%   77.50% ± 3.54%\n"
        "lowest      70.00%            75.00%\n"
        "ensemble                      100.00%\n"
    )


def test_the_columns_fit_long_seeds(capsys):
    result = RunResult(0.9, 0.8, torch.eye(10)[:4], torch.tensor([0, 1, 2, 3]))
    print_runs("Model_1", {"seed 20241128": result, "seed 20241129": result})
    lines = capsys.readouterr().out.strip().splitlines()
    assert {line.index("90.00%") for line in lines[1:5]} == {lines[0].index("Validation")}
    assert {line.index("80.00%") for line in lines[1:5]} == {lines[0].index("Test")}


def test_digits_that_a_data_set_does_not_have_are_left_out_of_the_recall(capsys):
    labels = torch.tensor([0, 0, 7, 7])
    metrics.print_scores("title", torch.eye(10)[[0, 1, 7, 7]], labels)
    assert (
        capsys.readouterr().out == "title\nTest Accuracy: 75.00% (1 errors)\nRecall: 0: 50.00%, 7: 100.00%\n"
    )


def test_latency_is_per_image_and_throughput_is_images_per_second(capsys, monkeypatch, mnist):
    ticks, sizes = iter(range(10**6)), []
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: 0.25 * next(ticks))
    monkeypatch.setattr(evaluate, "predict", lambda model, loader: torch.zeros(1))
    evaluate.print_speed(lambda images: sizes.append(len(images)) or images, mnist.test)
    assert capsys.readouterr().out == "Latency: 250.00 ms; throughput: 40,000 images/s\n\n"
    assert sizes == [1] * 100
