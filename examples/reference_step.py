"""The whole method in plain torch: momentum, top-k, error feedback, all-gather or gTop-k. P ranks in one process.

A gradient, residual, velocity or message is float32 (n,). A message is zero where nothing is sent, with a bool mask of
what is. The library gives the same bits (tests/examples/test_reference_step.py).
"""

import torch


def largest(values, eligible, k):
    """Mask of the k largest magnitudes among the eligible; ties go to the lower index."""
    order = torch.where(eligible, values.abs(), -1.0).sort(descending=True, stable=True).indices
    return torch.zeros_like(eligible).index_fill_(0, order[:k], True) & eligible


def select(gradient, residual, velocity, momentum, k):
    """Takes the message out of the residual."""
    velocity.mul_(momentum).add_(gradient)
    residual.add_(velocity)
    mask = largest(residual, residual != 0, k)
    message = torch.where(mask, residual, 0.0)
    residual[mask] = 0.0
    return message, mask


def all_gather(messages, k, factor):
    """Every pair contributes; the sum is formed in the order of the ranks."""
    total = torch.zeros_like(messages[0][0])
    for message, _ in messages:
        total += message * factor
    return total, [mask for _, mask in messages]


def gtop_k(messages, k, factor):
    """The k largest of the sum by pairwise merges. A value that any merge drops did not contribute."""

    def merge(a, b):
        total = a[0] + b[0]
        mask = largest(total, a[1] | b[1], k)
        return torch.where(mask, total, 0.0), mask, {p: kept & mask for p, kept in (a[2] | b[2]).items()}

    nodes = [(message, mask, {p: mask}) for p, (message, mask) in enumerate(messages)]
    core = 1 << (len(nodes).bit_length() - 1)  # ranks beyond the power of two fold into the first ones
    nodes = [merge(nodes[p], nodes[core + p]) if core + p < len(nodes) else nodes[p] for p in range(core)]
    while len(nodes) > 1:
        nodes = [merge(a, b) for a, b in zip(nodes[::2], nodes[1::2])]
    return nodes[0][0] * factor, [nodes[0][2][p] for p in range(len(messages))]


def step(gradients, residuals, velocities, k, momentum, exchange, masking=True):
    """The average gradient that all P ranks apply; updates residuals and velocities in place."""
    messages = [select(*rank, momentum, k) for rank in zip(gradients, residuals, velocities)]
    average, contributed = exchange(messages, k, 1 / len(messages))
    for (message, sent), arrived, residual, velocity in zip(messages, contributed, residuals, velocities):
        refused = sent & ~arrived
        residual[refused] = message[refused]  # error feedback: what did not arrive is sent later
        if masking and k < len(residual):
            velocity[arrived] = 0.0  # momentum factor masking
    return average
