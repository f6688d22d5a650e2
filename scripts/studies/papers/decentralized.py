"""Decentralized momentum SGD (Yu, Jin, Yang, Algorithm 2): networks, speed-up, consensus."""

from __future__ import annotations

import math

import torch

from commhooks.averaging import DecentralizedMomentum, topology
from commhooks.transports import in_process

from .claims import Budget, Claim, figure, slope, verdict
from .pr_sgd_m import BETA, HOW, mean_squared_gradient
from .problems import DigitsMLP
from .simulate import Setup, by_class, run

PAPER = "PR-SGD-M"
KINDS = ("complete", "ring", "torus", "hypercube", "exponential", "one_peer_exponential")


def curves(problem: DigitsMLP, network: topology.Topology, steps: int, rate: float, sort: bool, repeats: int):
    """Steps, losses of the mean model, and consensus distances."""
    shards = by_class(problem.labels, network.world_size) if sort else None
    setup = Setup(
        problem, network.world_size, steps, lambda t: rate, batch=4, repeats=repeats, momentum=BETA,
        mixing=network.matrices, shards=shards,
    )  # fmt: skip
    xs, ys, zs = [], [], []
    for state in run(setup):
        if state.step and state.step % max(1, steps // 32) == 0:
            xs.append(state.step)
            ys.append(float(problem.value(state.mean).mean()))
            zs.append(float((state.x - state.mean[:, None]).square().sum(dim=-1).mean().sqrt()) + 1e-16)
    return xs, ys, zs


def networks(budget: Budget) -> Claim:
    """Loss of the averaged model for six networks of 16 ranks: i.i.d. data, and data sorted by class."""
    workers, steps, problem, repeats = 16, budget.steps(1024), DigitsMLP(), budget.repeats(3)
    finals: dict[tuple[str, bool], float] = {}
    reference: dict[bool, list[float]] = {}
    with figure(budget, "decentralized_networks", 3) as axes:
        for kind in KINDS:
            network = getattr(topology, kind)(workers)
            label = f"{kind}, gap {network.spectral_gap:.2f}" + " a cycle" * (kind == "one_peer_exponential")
            for axis, sort in zip(axes, (False, True), strict=False):
                xs, ys, zs = curves(problem, network, steps, 0.02, sort, repeats)
                if kind == KINDS[0]:
                    reference[sort] = ys
                axis.plot(xs, [y / r for y, r in zip(ys, reference[sort], strict=True)], label=label)
                finals[kind, sort] = ys[-1]
            axes[2].semilogy(xs, zs, label=label)
        for axis, title in zip(
            axes, ("i.i.d. data", "each worker its own classes", "its own classes; complete: 0"), strict=True
        ):
            axis.set(xlabel="T", ylabel="loss of the mean / that of complete", title=title)
        axes[2].set(ylabel="consensus distance", ylim=(1e-3, None))
    relative = {key: loss / finals["complete", key[1]] for key, loss in finals.items()}
    even = max(v for (_, sort), v in relative.items() if not sort)
    slow = [
        curves(problem, getattr(topology, k)(workers), steps, 0.005, True, repeats)[1][-1]
        for k in ("ring", "complete")
    ]
    gentle = slow[0] / slow[1]
    return Claim(
        "decentralized_networks",
        PAPER,
        "Mixing with neighbours only preserves the convergence of averaging everything.",
        verdict(even < 1.1, relative["ring", True] < 1.1, gentle < relative["ring", True]),
        f"On i.i.d. data all six networks end within {even - 1:.1%} of the complete graph's loss after {steps} steps. "
        "When each worker has its own classes the sparse networks pay: "
        + ", ".join(f"{relative[k, True]:.2f} ({k})" for k in KINDS[1:])
        + f" times its loss at rate 0.02; for the ring {gentle:.2f} times at rate 0.005, so the price falls with the "
        "rate, as the theory's gamma = O(sqrt(P / T)) needs.",
        f"{HOW}; P = {workers}, b = 4.",
    )


def speedup_on_a_ring(budget: Budget) -> Claim:
    """The measure against P T on rings."""
    sizes, totals = (1, 2, 4, 8), [budget.steps(t) for t in (512, 1024, 2048, 4096)]
    points = []
    with figure(budget, "decentralized_speedup") as axis:
        for workers in sizes:
            values = []
            for steps in totals:
                rate = 0.3 * math.sqrt(workers / steps)
                setup = Setup(
                    DigitsMLP(), workers, steps, lambda t, r=rate: r, repeats=budget.repeats(3), momentum=BETA,
                    mixing=topology.ring(workers).matrices,
                )  # fmt: skip
                values.append(mean_squared_gradient(setup))
                points.append((workers * steps, values[-1]))
            axis.loglog([workers * t for t in totals], values, marker="o", label=f"P = {workers}")
        axis.set(xlabel="P T", ylabel="mean squared gradient norm", title="ring, gamma = 0.3 sqrt(P / T)")
    found = slope([p for p, _ in points], [v for _, v in points])
    return Claim(
        "decentralized_speedup",
        PAPER,
        "Algorithm 2 converges at O(1 / sqrt(P T)) as well: linear speed-up without any collective.",
        verdict(-0.75 < found < -0.4),
        f"On rings of 1 to {sizes[-1]} workers the measure falls as (P T)^{found:.2f} (the claim: -0.5).",
        f"{HOW}; b = 1.",
    )


def consensus(budget: Budget) -> Claim:
    """Distance to consensus by the library's averager, against the prediction of the spectral gap."""
    workers, rounds = 16, 24
    start = torch.randn(workers, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratios = {}
    with figure(budget, "decentralized_consensus") as axis:
        for number, kind in enumerate(("ring", "torus", "hypercube", "exponential")):
            network = getattr(topology, kind)(workers)

            def work(
                transport: in_process.InProcessTransport, network: topology.Topology = network
            ) -> list[float]:
                parameter = torch.nn.Parameter(start[transport.rank].clone())
                optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.0)
                averager = DecentralizedMomentum(optimizer, network, transport=transport)
                distances = [averager.consensus_distance([parameter])]
                for _ in range(rounds):
                    averager.average_parameters([parameter])
                    distances.append(averager.consensus_distance([parameter]))
                return distances

            distances = in_process.run(workers, work)[0]
            predicted = [distances[0] * (1 - network.spectral_gap) ** t for t in range(rounds + 1)]
            axis.semilogy(distances, color=f"C{number}", label=f"{kind}, gap {network.spectral_gap:.3f}")
            axis.semilogy(predicted, color=f"C{number}", ls=":")
            ratios[kind] = (distances[-1] / distances[rounds // 2]) ** (2 / rounds) / (
                1 - network.spectral_gap
            )
        axis.set(xlabel="mixings", ylabel="consensus distance", title=f"P = {workers}; dotted: (1 - gap)^t")
    return Claim(
        "decentralized_consensus",
        PAPER,
        "Mixing contracts the distance to consensus by max(|lambda_2|, |lambda_n|) = 1 - spectral gap a step.",
        verdict(*(0.9 < r <= 1.0 + 1e-6 for r in ratios.values())),
        "Measured rate over predicted rate in the second half: "
        + ", ".join(f"{r:.3f} ({k})" for k, r in ratios.items())
        + " (1: as predicted; below 1: faster).",
        "Library; one thread per rank, no gradients.",
    )


CLAIMS = (networks, speedup_on_a_ring, consensus)
