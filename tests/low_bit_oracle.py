"""The low-bit exchange as its pseudocode, in one process: every form is compared with it bit for bit."""

import torch

BLOCK = 256


def mean_magnitude(block):
    """The mean in the order that the format fixes: 16 rows into 16 lanes, then the lanes in halves."""
    rows = torch.zeros(BLOCK)
    rows[: block.numel()] = block.abs()
    lanes = torch.zeros(16)
    for row in rows.view(16, 16):
        lanes = lanes + row
    while lanes.numel() > 1:
        half = lanes.numel() // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0] / torch.tensor(float(block.numel()))


def rounded(x, bits):
    """What the codes of ``x`` (n,) decode to."""
    if bits == 32:
        return x.clone()
    if bits == 16:  # to the nearest bfloat16, ties to even, on the bits
        word = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
        return word.to(torch.int32).view(torch.float32)
    out = torch.empty_like(x)
    for start in range(0, x.numel(), BLOCK):
        block = x[start : start + BLOCK]
        levels = 2 ** (bits - 1) - 1
        if bits <= 2:
            scale = mean_magnitude(block) * (1.0 if bits == 1 else 0.625)
        else:
            scale = block.abs().max() / torch.tensor(float(levels))
        scale = scale.bfloat16().float()
        if scale < 2.0**-100:
            value = torch.zeros_like(block)
        elif bits == 1:
            value = torch.where(block >= 0, scale, -scale)
        elif bits == 2:
            size = torch.where(block.abs() >= 2 * scale, 3 * scale, scale)
            value = torch.where(block >= 0, size, -size)
        else:
            level = (block * (torch.tensor(1.0) / scale)).round().clamp(-levels, levels)
            value = (level + 0.0) * scale  # a level is an integer: there is no -0
        out[start : start + BLOCK] = value
    return out


def owners(numel, world_size):
    """Which rank owns each element: whole blocks, as evenly as they go."""
    blocks = -(-numel // BLOCK)
    owner = torch.zeros(numel, dtype=torch.int64)
    for rank in range(world_size):
        owner[blocks * rank // world_size * BLOCK :] = rank
    return owner


class LowBitRanks:
    """The ranks of a job: what each sender keeps, and what the owners keep, of a vector of ``numel`` elements.

    Attributes:
        owned: (numel,), the owners' memories one after another.
    """

    def __init__(self, world_size, numel, bits):
        self.world_size, self.bits = world_size, bits
        self.owned = torch.zeros(numel)

    def exchange(self, vectors):
        """Returns the mean of what the vectors' codes hold, and what each sender keeps."""
        sent = [rounded(x, self.bits) for x in vectors]
        total = torch.zeros_like(self.owned)
        for value in sent:
            total = total + value
        total = total * (1.0 / self.world_size) + self.owned
        mean = torch.zeros_like(total)
        owner = owners(total.numel(), self.world_size)
        for rank in range(self.world_size):  # chunks begin at block boundaries, so each rounds on its own
            mean[owner == rank] = rounded(total[owner == rank], self.bits)
        self.owned = total - mean
        return mean, [x - value for x, value in zip(vectors, sent, strict=True)]
