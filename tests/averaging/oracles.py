"""The papers' pseudocode as plain loops over workers in one process; nothing of commhooks is used here.

Everything is float64. A gradient is a function ``gradient(p, t, x)`` of worker, step (from 0) and point, the
same one the workers under test are given, so that trajectories can be compared step for step.
"""

from __future__ import annotations

import torch


def make_gradient(world_size, steps, numel, seed=0):
    """Gradients of quadratics of worker and step: ``A_pt x - b_pt`` with A a little off the identity."""
    generator = torch.Generator().manual_seed(seed)
    a = 0.2 * torch.randn(world_size, steps, numel, numel, generator=generator, dtype=torch.float64)
    a = a + torch.eye(numel, dtype=torch.float64)
    b = torch.randn(world_size, steps, numel, generator=generator, dtype=torch.float64)
    return lambda p, t, x: a[p, t] @ x - b[p, t]


def local_sgd(x0, gradient, world_size, steps, rate, sync, weights=None):
    """Local SGD, Algorithm 1 (with the averaged iterate of eq. 4). Returns ``(steps + 1, P, n)``."""
    weights = weights or [1.0] * world_size
    x = [x0.clone() for _ in range(world_size)]
    history = [torch.stack(x)]
    for t in range(steps):
        x = [x[p] - rate(t) * gradient(p, t, x[p]) for p in range(world_size)]
        if t + 1 in sync:
            mean = sum(w * xp for w, xp in zip(weights, x, strict=True)) / sum(weights)
            x = [mean.clone() for _ in range(world_size)]
        history.append(torch.stack(x))
    return torch.stack(history)


def m_avg(x0, gradient, world_size, blocks, period, rate, mu):
    """M-AVG, Algorithm 1. Returns the iterates ``(steps + 1, P, n)``, and w~, v, d per block."""
    w_tilde, v = x0.clone(), torch.zeros_like(x0)
    history, w_tildes, vs, ds = [x0.expand(world_size, -1)], [w_tilde], [v], []
    for n in range(blocks):
        w = [w_tilde.clone() for _ in range(world_size)]
        for k in range(period):
            w = [w[p] - rate * gradient(p, n * period + k, w[p]) for p in range(world_size)]
            if k < period - 1:
                history.append(torch.stack(w))
        a = sum(w) / world_size
        d = a - w_tilde
        v = mu * v + d
        w_tilde = w_tilde + v
        history.append(w_tilde.expand(world_size, -1))
        w_tildes.append(w_tilde)
        vs.append(v)
        ds.append(d)
    return torch.stack(history), w_tildes, vs, ds


def _momentum_step(option, x, u, g, gamma, beta):
    u = beta * u + g
    if option == "I":
        return x - gamma * u, u
    v = beta * u + g
    return x - gamma * v, u


def pr_sgd_m(x0, gradient, world_size, steps, rate, beta, period, option):
    """PR-SGD-Momentum, Algorithm 1. Returns x and u, ``(steps + 1, P, n)`` each."""
    x = [x0.clone() for _ in range(world_size)]
    u = [torch.zeros_like(x0) for _ in range(world_size)]
    xs, us = [torch.stack(x)], [torch.stack(u)]
    for t in range(1, steps + 1):
        for p in range(world_size):
            x[p], u[p] = _momentum_step(option, x[p], u[p], gradient(p, t - 1, x[p]), rate, beta)
        if t % period == 0:
            x_mean, u_mean = sum(x) / world_size, sum(u) / world_size
            x = [x_mean.clone() for _ in range(world_size)]
            u = [u_mean.clone() for _ in range(world_size)]
        xs.append(torch.stack(x))
        us.append(torch.stack(u))
    return torch.stack(xs), torch.stack(us)


def decentralized(x0, gradient, world_size, steps, rate, beta, matrices, option):
    """PR-SGD-M, Algorithm 2, with W of step t ``matrices[t % len]``; ``x0`` is ``(n,)`` or ``(P, n)``."""
    x = [row.clone() for row in x0.expand(world_size, x0.shape[-1])]
    u = [torch.zeros_like(row) for row in x]
    xs, us = [torch.stack(x)], [torch.stack(u)]
    for t in range(1, steps + 1):
        for p in range(world_size):
            x[p], u[p] = _momentum_step(option, x[p], u[p], gradient(p, t - 1, x[p]), rate, beta)
        w = matrices[(t - 1) % len(matrices)]
        x = [sum(w[j, i] * x[j] for j in range(world_size)) for i in range(world_size)]
        u = [sum(w[j, i] * u[j] for j in range(world_size)) for i in range(world_size)]
        xs.append(torch.stack(x))
        us.append(torch.stack(u))
    return torch.stack(xs), torch.stack(us)


def minibatch_momentum(x0, gradient, world_size, steps, rate, beta, option="I"):
    """Synchronous momentum SGD on the mean of the workers' gradients. Returns ``(steps + 1, n)``."""
    x, u = x0.clone(), torch.zeros_like(x0)
    history = [x]
    for t in range(steps):
        g = sum(gradient(p, t, x) for p in range(world_size)) / world_size
        x, u = _momentum_step(option, x, u, g, rate, beta)
        history.append(x)
    return torch.stack(history)


def stagewise(w0, gradient, world_size, stages, beta, eta0, gamma, keep):
    """Stagewise M-DSGD, eq. 15 and 16 over Algorithm 1 with top-``keep`` masks per worker.

    ``gradient(p, t, w)`` counts t through all stages. Returns the stages' starts w~_s and all iterates.
    """
    w_tilde, starts, iterates, step = w0.clone(), [w0.clone()], [], 0
    for s, length in enumerate(stages):
        w, eta = w_tilde.clone(), eta0 / (s + 1)
        v = [torch.zeros_like(w) for _ in range(world_size)]
        u = [torch.zeros_like(w) for _ in range(world_size)]
        visited = []
        for _ in range(length):
            visited.append(w.clone())
            iterates.append(w.clone())
            total = torch.zeros_like(w)
            for p in range(world_size):
                g = gradient(p, step, w) + (w - w_tilde) / gamma
                v[p] = beta * v[p] + g
                c = v[p] + u[p]
                mask = torch.zeros_like(c)
                mask[c.abs().topk(keep).indices] = 1.0
                u[p] = (1 - mask) * c
                total += mask * c
            w = w - eta * total / world_size
            step += 1
        w_tilde = torch.stack(visited).mean(dim=0)
        starts.append(w_tilde.clone())
    return starts, iterates


def blocks_with(x0, gradient, world_size, steps, rate, sync, outer_step):
    """Local SGD steps from w~; after each step of ``sync`` ``outer_step(w~, Delta)`` gives the next w~.

    Returns the iterates ``(steps + 1, P, n)``. ``Delta = w~ - mean_p w_p`` is the outer gradient.
    """
    w_tilde = x0.clone()
    w = [w_tilde.clone() for _ in range(world_size)]
    history = [torch.stack(w)]
    for t in range(steps):
        w = [w[p] - rate(t) * gradient(p, t, w[p]) for p in range(world_size)]
        if t + 1 in sync:
            w_tilde = outer_step(t, w_tilde, w_tilde - sum(w) / world_size)
            w = [w_tilde.clone() for _ in range(world_size)]
        history.append(torch.stack(w))
    return torch.stack(history)


def nesterov_outer(lr, momentum):
    """DiLoCo's outer step, in torch's form: ``b = m b + Delta; w~ = w~ - lr (Delta + m b)``."""
    b = 0.0

    def step(t, w_tilde, delta):
        nonlocal b
        b = momentum * b + delta
        return w_tilde - lr * (delta + momentum * b)

    return step


def slowmo_outer(rate, alpha, beta):
    """SlowMo, Algorithm 1, lines 7 and 8; ``rate(t)`` is gamma, a number or one for each element."""
    u = 0.0

    def step(t, w_tilde, delta):
        nonlocal u
        u = beta * u + delta / rate(t)
        return w_tilde - alpha * rate(t) * u

    return step


def nesterov_block_momentum(x0, gradient, world_size, steps, rate, period, eta, zeta):
    """BMUF with Nesterov block momentum (Chen and Huo, ICASSP 2016): the blocks' starting points.

    ``G = mean_p w_p - W_init; Delta = eta Delta + zeta G; W = W + Delta; W_init = W + eta Delta``.
    """
    w_global, delta, start = x0.clone(), torch.zeros_like(x0), x0.clone()
    starts = [start]
    for block in range(steps // period):
        w = [start.clone() for _ in range(world_size)]
        for k in range(period):
            w = [w[p] - rate * gradient(p, block * period + k, w[p]) for p in range(world_size)]
        g = sum(w) / world_size - start
        delta = eta * delta + zeta * g
        w_global = w_global + delta
        start = w_global + eta * delta
        starts.append(start)
    return starts
