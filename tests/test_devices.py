"""A whole run on a device other than the CPU, on a machine without one.

PyTorch's meta device stands in for the accelerator; its tensors have shapes but no values. What needs
values is replaced: copies to the CPU are noise, and all values count as finite. Plain optimizers replace
fused ones. Everything else is as in a real run. An operation on tensors of two devices is an error, and so is
waiting for the device within an epoch.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import datafile
import evaluate
import models
import train
from conftest import BLOCK, TEST_LINE, WEIGHTS, best_weights
from support import checkpoint, devices

META = torch.device("meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*is a no-op")  # a value is copied to a tensor without values
COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class OneDevice(TorchDispatchMode):
    """Rejects operations on tensors of two devices, except copies and scalars."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function not in COPIES:
            devices = {tensor.device.type for tensor in tensors if tensor.dim()}
            assert len(devices) < 2, f"{function} on {devices}"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def meta(monkeypatch):
    """Makes the replacements; within the steps of an epoch, a copy to the CPU is an error."""
    in_epoch = []

    class Batches(datafile.ShuffledBatchSampler):
        def __iter__(self):
            in_epoch.append(True)
            yield from super().__iter__()
            in_epoch.pop()

    def noise_from_meta(tensor):
        assert not in_epoch, "an epoch waits for the device"
        noise = torch.rand(tensor.shape) if tensor.is_meta else tensor
        return noise.to(tensor.dtype)

    monkeypatch.setattr(datafile, "ShuffledBatchSampler", Batches)
    monkeypatch.setattr(torch.Tensor, "cpu", noise_from_meta)
    for name in "adam", "sgd":  # no device but the real ones has fused optimizers
        fused, multiple = train.OPTIMIZERS[name]
        monkeypatch.setitem(train.OPTIMIZERS, name, (functools.partial(fused, fused=False), multiple))
    with OneDevice():
        yield


def arguments(small_data, folder, *others):
    options = "--model", "Model_3", "--data-dir", small_data, "--output-dir", folder, *others
    args = train.parse_args(list(map(str, options)))
    args.device = META  # --device rejects it, as it has no data
    return args


def values_for(state):
    """A state whose tensors have values, on the CPU, as in the file of a real run."""
    if isinstance(state, dict):
        return {key: values_for(value) for key, value in state.items()}
    return torch.zeros(state.shape, dtype=state.dtype) if getattr(state, "is_meta", False) else state


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_stays_on_its_device_and_never_waits_for_it(optimizer, small_data, tmp_path, capsys, meta):
    args = arguments(small_data, tmp_path, "--epochs", 2, "--optimizer", optimizer)
    _, _, logits, labels = train.train("Model_3", args, 0)
    output = capsys.readouterr().out
    assert "Model_3 on meta: --batch-size 128 --optimizer " in output
    assert len(BLOCK.findall(output)) == 2 and TEST_LINE.search(output)
    assert (logits.device.type, labels.device.type) == ("cpu", "cpu")
    (weights,) = best_weights(tmp_path).values()
    assert {value.device.type for value in weights.values()} == {"cpu"}

    # A saved state comes back to the device, and the generators' states to the CPU.
    last = tmp_path / "last_Model_3.pth"
    state = values_for(checkpoint.read(last))
    torch.save(state, last)
    loaders = datafile.get_loaders(device=META, data_dir=small_data)
    resumed = train.create_training_state("Model_3", args, 0, None, loaders)
    resumed.resume(last, tmp_path / "best_Model_3.pth")
    for part in resumed.model, resumed.average_model:
        assert all(value.is_meta for value in part.state_dict().values())
    for moments in resumed.optimizer.state.values():
        tensors = [moment for moment in moments.values() if torch.is_tensor(moment) and moment.dim()]
        assert tensors and all(moment.is_meta for moment in tensors)
    assert torch.equal(loaders.generator.get_state(), state["state"]["random"]["loader"])
    assert torch.equal(torch.get_rng_state(), state["state"]["random"]["cpu"])
    train.run_epoch(resumed, loaders, augmented=True)
    assert len(resumed.history) == 3


def test_evaluation_and_its_plots_use_the_device_only_for_forward_passes(
    small_data, tmp_path, capsys, meta, monkeypatch
):
    args = evaluate.parse_args([str(WEIGHTS / "Model_3.pth"), "--plot", str(tmp_path)])
    args.device, args.data_dir = META, small_data
    model = checkpoint.load(WEIGHTS / "Model_3.pth").to(META)
    evaluate.evaluate([model], args)
    output = capsys.readouterr().out
    assert "Test Accuracy: " in output and "Latency: " in output
    assert {path.stem for path in tmp_path.iterdir()} == {"confusion", "mistakes"}


class StandIn:
    """Stands in for `torch.cuda.CUDAGraph` on the CPU: repeats recorded operations on the same tensors.

    As in a real graph, its results have no values before the first replay.
    """

    replays = 0

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        StandIn.replays += 1
        for function, arguments, options, results in self.calls:
            again = function(*arguments, **options)
            for result, value in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(result, torch.Tensor) and result.data_ptr() != value.data_ptr():
                    result.data.copy_(value)


class Recording(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        given = set()  # the storage of parameters and inputs keeps its values
        for _, arguments, _, results in self.graph.calls:
            given |= {leaf.data_ptr() for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
            for result in tree_leaves(results):
                if torch.is_tensor(result) and result.is_floating_point() and result.data_ptr() not in given:
                    result.data.fill_(torch.nan)


def test_a_captured_step_trains_as_the_step_itself(mnist, monkeypatch):
    """The last batch is smaller. On CUDA, the real graph is tested in test_train.py."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    images, labels = (tensor[:500] for tensor in mnist.validation.dataset.tensors)
    batches = list(zip(images.split(128), labels.split(128)))
    results = []
    for is_captured in True, False:
        torch.manual_seed(0)
        model = models.Model_1()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003, fused=True)

        def compute_gradients(images, labels, model=model, optimizer=optimizer):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            return (loss.detach(),)

        step = devices.capture(compute_gradients, *batches[0]) if is_captured else compute_gradients
        losses = []
        for batch in batches:
            losses.append(step(*batch)[0].clone())
            optimizer.step()
        results.append((losses, model.state_dict()))
    torch.testing.assert_close(*results)
    assert len(set(map(float, results[0][0]))) == len(batches)
    assert StandIn.replays == len(batches) - 1
