"""A small GPT between sites: one bit of the model's change every 4 steps, with Muon inside and AdamW for the rest.

torchrun --nproc-per-node 2 examples/slow_link_gpt.py

The text is this file. Every rank has a model of its own, and the common one is what is evaluated and saved.
"""

import torch
import torch.distributed as dist
from torch import nn

from commhooks import LowBit
from commhooks.averaging import DiLoCo

STEPS, WINDOW, WIDTH = 100, 32, 64


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(128, WIDTH), nn.Embedding(WINDOW, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(WINDOW)

    def loss(self, rows):
        x = self.layers(self.token(rows[:, :-1]) + self.place.weight, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy((x @ self.token.weight.T / 8).mT, rows[:, 1:])


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # all ranks start from the same model
    model, text = GPT(), torch.tensor(list(open(__file__, "rb").read()))
    hidden = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=3e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=3e-3)
    outer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5, nesterov=True)
    averager = DiLoCo(model.parameters(), outer, sync_every=4, wire=LowBit(1), module=model)

    torch.manual_seed(dist.get_rank())  # each rank draws its own windows
    for step in range(STEPS):
        model.zero_grad()
        model.loss(text[torch.randint(len(text) - WINDOW, (8, 1)) + torch.arange(WINDOW + 1)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        averager.average_parameters(model.parameters())
    with averager.common_model(), torch.no_grad():  # the same on all ranks
        common = model.loss(text.unfold(0, WINDOW + 1, WINDOW))
    sent, size = averager.stats()["bytes_sent"] // STEPS, sum(4 * p.numel() for p in model.parameters())
    print(f"rank {dist.get_rank()}: loss {common:.3f}; bytes a step: {sent:,} sent, {size:,} in the model")
    averager.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
