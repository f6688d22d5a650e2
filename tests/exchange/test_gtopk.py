"""gTop-k beside the original code's three faults: lost mass, P a power of two only, 16 bytes a pair."""

import pytest
import torch
from ranks import assert_same_bits, integers, run_steps

from commhooks import Bucket, GTopK, Reducer, SparseGrad, TopK
from commhooks.native.fused import PAD
from commhooks.transports import in_process
from commhooks.wire.message import Context

ALGORITHMS = ("doubling", "tree")


def run_one(corrected, k, algorithm):
    """One step from empty memory; returns the update and each rank's residual, float32."""
    scheme = "gtopk" if algorithm == "doubling" else "gtopk-tree"
    seen = run_steps(len(corrected), scheme, k / corrected[0].numel(), [corrected])[0]
    for rank in seen:
        assert_same_bits(rank.output, seen[0].output)
    return seen[0].output, [rank.residual for rank in seen]


def original_residuals(corrected, k, update):
    """The original code's rule: a selected value goes back only where its index is missing from the final set."""
    residuals = []
    for c in corrected:
        selected = torch.sort(c.abs(), descending=True, stable=True).indices[:k]
        residual = c.clone()
        residual[[i for i in selected.tolist() if update[i] != 0]] = 0.0
        residuals.append(residual)
    return residuals


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "corrected",
    [
        [[0, 6], [8, 0], [5, 0]],  # rank 2 folds into 0, its 5 is dropped there; rank 1 brings index 0 back
        [[0, 6], [5, 0], [4, 0], [4, 0]],
        [[0, 6], [9, 0], [0, 0], [0, 0], [5, 0]],
    ],
)
def test_the_original_restore_rule_loses_mass_and_ours_does_not(corrected, algorithm):
    corrected = [torch.tensor(c, dtype=torch.float32) for c in corrected]
    everything = torch.stack(corrected).sum(0)
    update, ours = run_one(corrected, 1, algorithm)
    original = original_residuals(corrected, 1, update)
    assert torch.equal(torch.stack(ours).sum(0) + update, everything)
    lost = everything - (torch.stack(original).sum(0) + update)
    assert lost.tolist() == [5.0, 0.0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_random_data_the_original_rule_loses_mass_too(algorithm):
    generator = torch.Generator().manual_seed(0)
    corrected = [integers(generator, 200, -50, 50) for _ in range(8)]
    everything = torch.stack(corrected).sum(0)
    update, ours = run_one(corrected, 10, algorithm)
    assert torch.equal(torch.stack(ours).sum(0) + update, everything)
    original = original_residuals(corrected, 10, update)
    assert (everything - torch.stack(original).sum(0) - update).abs().sum() > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [3, 5, 6, 7, 9, 12, 17])
def test_any_number_of_ranks(world_size, algorithm):
    generator = torch.Generator().manual_seed(world_size)
    corrected = [integers(generator, 50) for _ in range(world_size)]
    update, residuals = run_one(corrected, 5, algorithm)
    assert torch.equal(torch.stack(residuals).sum(0) + update, torch.stack(corrected).sum(0))
    assert int((update != 0).sum()) <= 5


def test_a_pair_costs_eight_bytes_on_the_wire():
    sizes = []
    for k in (100, 101):
        sent = []

        def work(transport, k=k, sent=sent):
            exchange = transport.move
            transport.move = lambda sends, receives, tag, what: (
                sent.extend(b.numel() * b.element_size() for _, b in sends),
                exchange(sends, receives, tag, what),
            )
            values, indices = torch.randn(k), torch.arange(k, dtype=torch.int32)
            GTopK(transport).aggregate(transport, SparseGrad(values, indices, 1000), False, Context(0, 0))

        in_process.run(2, work)
        assert len(set(sent)) == 1 and len(sent) == 2
        sizes.append(sent[0])
    assert sizes[1] - sizes[0] == 8 and sizes[0] == 16 + 800


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_exactly_k_values_although_magnitudes_tie(algorithm):
    """Eq. 4's strict > would keep k - 1 or fewer; ties go to the lower index."""
    corrected = [torch.ones(10) for _ in range(3)]
    update, _ = run_one(corrected, 4, algorithm)
    assert update.tolist() == [3.0] * 4 + [0.0] * 6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zeros_are_not_sent_where_nonzeros_exist(algorithm):
    corrected = [torch.zeros(10) for _ in range(3)]
    corrected[1][9] = -1.0
    update, residuals = run_one(corrected, 4, algorithm)
    assert update.tolist() == [0.0] * 9 + [-1.0]
    assert all(not residual.any() for residual in residuals)


def test_doubling_and_tree_agree_for_every_number_of_ranks():
    for world_size in range(1, 10):
        generator = torch.Generator().manual_seed(world_size)
        corrected = [torch.randn(40, generator=generator) for _ in range(world_size)]
        update, residuals = run_one(corrected, 4, "doubling")
        other_update, other_residuals = run_one(corrected, 4, "tree")
        assert_same_bits(update, other_update)
        assert_same_bits(torch.stack(residuals), torch.stack(other_residuals))


def test_padding_is_neither_contributed_nor_refused():
    def work(transport):
        indices = torch.tensor([3, PAD, PAD], dtype=torch.int32)
        pairs = SparseGrad(torch.tensor([float(transport.rank + 1), 0.0, 0.0]), indices, 5)
        return GTopK(transport).aggregate(transport, pairs, False, Context(0, 0))

    for out in in_process.run(5, work):
        assert out.contributed.indices.tolist() == [3] and out.refused.k == 0
        assert SparseGrad(out.values[0], out.indices[0], 5).to_dense().tolist() == [0, 0, 0, 15, 0]


def test_one_vote_reaches_every_rank():
    for world_size in (2, 3, 5, 8):
        for culprit in range(world_size):
            for algorithm in ALGORITHMS:

                def work(transport, culprit=culprit, algorithm=algorithm):
                    red = Reducer(TopK(0.5), GTopK(transport, algorithm), dense_crossover=False)
                    g = torch.ones(4)
                    if transport.rank == culprit:
                        g[1] = float("inf")
                    red.reduce(Bucket(0, g, ("p",), (4,)))
                    return g

                for g in in_process.run(world_size, work):
                    assert g.isnan().all(), (world_size, culprit, algorithm)
