"""OutputAverage beside averagers with weights, and with BatchNorm; its cost."""

import pytest
import torch

from commhooks.averaging import LocalSGD, OutputAverage, Quadratic, Uniform
from commhooks.transports import in_process

from .workers import Pieces, start


def test_an_averagers_weights_count():
    """x^ is weighted as the iterates are (Local SGD, section 3); a transport counts all workers alike."""
    weights = [1.0, 2.0, 3.0, 10.0]
    points = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps = torch.tensor([Quadratic(2.0)(t) for t in range(3)], dtype=torch.float64)
    by_worker = (steps[:, None] * points).sum(dim=1) / steps.sum()
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)

    def work(transport):
        model = Pieces(start())
        averager = LocalSGD(5, weight=weights[transport.rank], transport=transport)
        output = OutputAverage(model.parameters(), Quadratic(2.0))
        for point in points[transport.rank]:
            model.load_state_dict(Pieces(point).state_dict())
            output.update()
        return output.result(averager), output.result(transport)

    for weighted, plain in in_process.run(4, work):
        torch.testing.assert_close(weighted, share @ by_worker, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plain, by_worker.mean(dim=0), rtol=1e-12, atol=1e-12)


def test_batch_norms_statistics_are_made_anew_inside_and_put_back():
    """The pass over this rank's batches, averaged over the workers: the statistics of the averaged model."""
    data = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(1)) * 3 + 2

    def network():
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        for p in model.parameters():
            torch.nn.init.constant_(p, 0.5)
        return model

    def work(transport):
        model = network()
        output = OutputAverage(model, Uniform())
        output.update()
        with torch.no_grad():
            model[0].weight.fill_(7.5)
        output.update()
        kept = [b.clone() for b in model.buffers()]
        batches = data[transport.rank].split(16)
        with output.applied(transport, batches=[(b, None) for b in batches]):
            inside = [model[1].running_mean.clone(), model[1].running_var.clone()]
            assert not torch.equal(model[1].running_mean, kept[0])
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), kept, strict=True))
        with output.applied(transport):
            assert all(torch.equal(a, b) for a, b in zip(model.buffers(), kept, strict=True))
        return torch.stack(inside)

    model = network()
    with torch.no_grad():
        model[0].weight.fill_(4.0)
    hidden = model[0](data).detach()  # (worker, sample, feature)
    mean = hidden.mean(dim=(0, 1))
    var = hidden.view(2, 4, 16, 3).var(dim=2).mean(dim=(0, 1))
    for result in in_process.run(2, work):
        torch.testing.assert_close(result, torch.stack([mean, var]))


def test_batches_need_the_model():
    output = OutputAverage(Pieces(start()).parameters(), Uniform())
    output.update()
    with pytest.raises(ValueError, match=r"batches needs OutputAverage\(model"), output.applied(batches=[]):
        pass


@pytest.mark.parametrize("channels_last", (False, True))
def test_an_update_makes_no_copy_of_the_model(channels_last):
    """The running sum is the only memory of the model's size that an update touches."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    weight = torch.randn(500, 200, 3, 3, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight.clone(memory_format=form))
    model.scale = torch.nn.Parameter(torch.tensor(2.0))
    output = OutputAverage(model, Quadratic(2.0))
    output.update()
    sums = [total.data_ptr() for total in output._sums]
    with torch.profiler.profile(profile_memory=True) as profile:
        output.update()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 1000 * 1000  # a float64 copy would be 7.2 MB
    assert [total.data_ptr() for total in output._sums] == sums
    with torch.no_grad():
        model.weight.mul_(3.0)
    output.update()
    expected = weight.double() * (2.0**2 + 3.0**2) + (weight * 3.0).double() * 4.0**2
    expected = torch.cat((expected.reshape(-1), torch.full((1,), 2.0 * 29))) / 29
    torch.testing.assert_close(output.result(), expected.double(), rtol=1e-14, atol=1e-14)


def test_complex_parameters_keep_both_parts():
    parameter = torch.nn.Parameter(torch.tensor([1 + 2j]))
    output = OutputAverage([parameter], Uniform())
    output.update()
    with torch.no_grad():
        parameter.fill_(3 + 6j)
    output.update()
    assert output.result().tolist() == [2.0, 4.0]
    with output.applied():
        assert parameter.item() == 2 + 4j
    assert parameter.item() == 3 + 6j


def test_states_of_other_shapes_are_refused():
    output = OutputAverage(Pieces(start()).parameters(), Uniform())
    output.update()
    with pytest.raises(ValueError, match=r"sums must be of 1 parameters.*\(3, 2\)"):
        OutputAverage([torch.nn.Parameter(torch.zeros(3))], Uniform()).load_state_dict(output.state_dict())
