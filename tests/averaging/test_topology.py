"""Networks: weights, the checks of a mixing matrix, and that consensus contracts as the gap predicts."""

import functools
import itertools

import pytest
import torch

from commhooks.averaging import DecentralizedMomentum, topology
from commhooks.transports import in_process

from .workers import NUMEL, Pieces, in_ranks

KINDS = ("ring", "torus", "exponential", "complete", "one_peer_exponential")


@pytest.mark.parametrize("world_size", range(1, 18))
def test_every_matrix_is_doubly_stochastic_and_has_the_right_neighbours(world_size):
    for kind in KINDS:
        network = getattr(topology, kind)(world_size)
        assert network.world_size == world_size
        assert 0.0 < network.spectral_gap <= 1.0
        for turn, w in enumerate(network.matrices):
            ones = torch.ones(world_size, dtype=torch.float64)
            torch.testing.assert_close(w @ ones, ones, rtol=0, atol=1e-12)
            torch.testing.assert_close(w.T @ ones, ones, rtol=0, atol=1e-12)
            for rank in range(world_size):
                sends, weights = network.neighbours(rank, turn)
                assert rank not in sends and sum(weight for _, weight in weights) == pytest.approx(1.0)
                for peer, weight in weights:  # who is received from sends
                    assert weight == w[peer, rank]
                    assert peer == rank or rank in network.neighbours(peer, turn)[0]
        if kind != "one_peer_exponential":
            assert torch.equal(network.matrices[0], network.matrices[0].T)


def test_known_weights_and_gaps():
    ring = topology.ring(6)
    assert ring.neighbours(0, 0) == ([1, 5], [(0, pytest.approx(1 / 3)), (1, 1 / 3), (5, 1 / 3)])
    eigenvalue = (1 + 2 * torch.cos(torch.tensor(2 * torch.pi / 6, dtype=torch.float64))) / 3
    assert ring.spectral_gap == pytest.approx(1 - float(eigenvalue))
    assert topology.complete(5).spectral_gap == pytest.approx(1.0)
    cube = topology.hypercube(8)
    assert cube.spectral_gap == pytest.approx(0.5) and cube.degree(3) == 3  # eigenvalues 1 - 2 j / (d + 1)
    assert topology.torus(12, rows=3).degree(0) == 4 and topology.torus(16).degree(5) == 4
    assert topology.exponential(16).degree(0) == 7  # +-1, +-2, +-4, 8
    one_peer = topology.one_peer_exponential(8)
    assert [one_peer.neighbours(5, t)[0] for t in range(4)] == [[6], [7], [1], [6]]
    assert one_peer.spectral_gap == pytest.approx(1.0)
    assert topology.one_peer_exponential(6).spectral_gap < 1.0


def test_metropolis_weights_of_a_star():
    star = topology.from_edges(4, [(0, 1), (0, 2), (3, 0)])
    w = star.matrices[0]
    assert w[0].tolist() == pytest.approx([0.25] * 4) and w[1, 1] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: topology.from_matrix([[0.5, 0.5, 0.0]]), r"square.*\(1, 3\)"),
        (lambda: topology.from_matrix([[0.6, 0.4], [0.3, 0.7]]), "column 0 with sum 0.9"),
        (lambda: topology.from_matrix([[0.5, 0.4], [0.4, 0.5]]), "row 0 with sum 0.9"),
        (lambda: topology.from_matrix([[1.5, -0.5], [-0.5, 1.5]]), "negative.*-0.5"),
        (lambda: topology.from_matrix([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]), r"symmetric.*W\[0, 1\] = 1"),
        (lambda: topology.from_matrix([[1.0, 0.0], [0.0, 1.0]]), "connected.*1"),
        (lambda: topology.from_matrix([[0.0, 1.0], [1.0, 0.0]]), "bipartite.*-1"),
        (lambda: topology.from_matrix([[float("nan")]]), "finite.*nan"),
        (lambda: topology.from_edges(4, [(0, 1), (2, 3)]), "connected"),
        (lambda: topology.from_edges(2, [(0, 2)]), r"\(0, 2\)"),
        (lambda: topology.from_edges(2, [(1, 1)]), r"\(1, 1\)"),
        (lambda: topology.hypercube(6), "power of two.*6"),
        (lambda: topology.torus(12, rows=5), "rows.*5"),
        (lambda: topology.ring(0), "world_size.*0"),
        (lambda: topology.time_varying([]), "empty"),
        (lambda: topology.time_varying([[[1.0]], [[0.5, 0.5], [0.5, 0.5]]]), r"\(1, 1\)"),
        (lambda: topology.time_varying([[[0.0, 1.0], [1.0, 0.0]]]), "connected over one cycle"),
    ],
)
def test_bad_networks_are_named(make, shown):
    with pytest.raises(ValueError, match=shown):
        make()


def test_turns_may_be_connected_only_together():
    pairs = [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]
    matrices = []
    for turn in pairs:
        w = torch.zeros(4, 4, dtype=torch.float64)
        for i, j in turn:
            w[[i, i, j, j], [i, j, i, j]] = 0.5
        matrices.append(w)
    assert topology.time_varying(matrices).spectral_gap == pytest.approx(1.0)  # two turns average four ranks


@pytest.mark.parametrize("world_size", (3, 4, 8, 9))
def test_consensus_contracts_at_the_rate_of_the_spectral_gap(world_size):
    """From the worst start (W's second eigenvector) by exactly 1 - gap a step; else at least so fast."""
    rounds = 8
    chain = topology.from_edges(world_size, itertools.pairwise(range(world_size)), "chain")
    for network in (topology.ring(world_size), topology.exponential(world_size), chain):
        if network.spectral_gap > 0.999:
            continue
        values, vectors = torch.linalg.eigh(network.matrices[0] - 1.0 / world_size)
        worst = vectors[:, int(values.abs().argmax())]

        def work(transport, direction, network=network):
            flat = torch.full((NUMEL,), 1.0, dtype=torch.float64) + direction[transport.rank]
            model = Pieces(flat)
            model.set_gradient(torch.zeros(NUMEL, dtype=torch.float64))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
            averager = DecentralizedMomentum(optimizer, network, transport=transport)
            distances = [averager.consensus_distance(model.parameters())]
            for _ in range(rounds):
                optimizer.step()
                averager.average_parameters(model.parameters())
                distances.append(averager.consensus_distance(model.parameters()))
            return torch.tensor(distances, dtype=torch.float64)

        rate = 1.0 - network.spectral_gap
        distances = in_ranks(world_size, functools.partial(work, direction=worst))[:, 0]
        torch.testing.assert_close(
            distances[1:] / distances[:-1], torch.full((rounds,), rate, dtype=torch.float64)
        )
        anything = torch.randn(world_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        distances = in_ranks(world_size, functools.partial(work, direction=anything))[:, 0]
        assert (distances[1:] <= rate * distances[:-1] * (1 + 1e-9)).all()


def test_a_cycle_of_the_one_peer_graph_averages_exactly():
    network = topology.one_peer_exponential(8)

    def work(transport):
        model = Pieces(torch.full((NUMEL,), float(transport.rank), dtype=torch.float64))
        model.set_gradient(torch.zeros(NUMEL, dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        averager = DecentralizedMomentum(optimizer, network, transport=transport)
        for _ in range(3):
            averager.average_parameters(model.parameters())
        return model.flat()

    assert torch.equal(in_ranks(8, work), torch.full((NUMEL, 8), 3.5, dtype=torch.float64))


def test_a_directed_matrix_mixes_and_keeps_the_mean():
    """Doubly stochastic, not symmetric: taken where it is said to be directed."""
    w = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]
    with pytest.raises(ValueError, match="symmetric.*directed=True"):
        topology.from_matrix(w)
    network = topology.from_matrix(w, directed=True)
    singular = torch.linalg.svdvals(torch.tensor(w, dtype=torch.float64) - 1 / 3)
    assert network.spectral_gap == pytest.approx(1 - float(singular[0]))
    starts = torch.arange(30, dtype=torch.float64).view(3, 10) ** 1.5

    def work(transport):
        model = Pieces(starts[transport.rank])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        averager = DecentralizedMomentum(optimizer, network, transport=transport)
        averager.average_parameters(model.parameters())
        return model.flat()

    result = in_ranks(3, work).T
    torch.testing.assert_close(result, torch.tensor(w, dtype=torch.float64).T @ starts)
    torch.testing.assert_close(result.mean(dim=0), starts.mean(dim=0))
    with pytest.raises(ValueError, match="column 0 with sum 0.9"):
        topology.from_matrix([[0.6, 0.4], [0.3, 0.7]], directed=True)


def test_matrices_are_fingerprinted_once(monkeypatch):
    network = topology.one_peer_exponential(4)
    seen = []
    monkeypatch.setattr(topology, "digest_of", lambda matrices: seen.append(1) or 7)

    def work(transport):
        model = Pieces(torch.zeros(NUMEL, dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        averager = DecentralizedMomentum(optimizer, network, transport=transport)
        for _ in range(5):
            averager.average_parameters(model.parameters())

    in_process.run(4, work)
    assert 1 <= len(seen) <= 4  # at most once by each of four threads that begin together
    other = topology.from_matrix([[0.5, 0.5], [0.5, 0.5]])
    monkeypatch.undo()
    assert other.digest != topology.from_matrix([[0.4, 0.6], [0.6, 0.4]]).digest
