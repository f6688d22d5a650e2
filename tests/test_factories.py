"""Every tensor of ours names its device and dtype: the user's defaults may be others, and imports may be inside them."""

import ast
import sys
import textwrap
from pathlib import Path

from launch import run, spawn_gloo

import commhooks

PACKAGE = Path(commhooks.__file__).parent
NEED_DTYPE = {
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "eye",
    "linspace",
    "tensor",
    "arange",
    "scalar_tensor",
}
FACTORIES = NEED_DTYPE | {"randint", "randperm", "as_tensor", "asarray", "empty_strided"}


def unnamed(tree):
    """Line and name of the calls of torch's factories that leave the device or the dtype to the defaults."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        if name not in FACTORIES or not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if "device" not in given or (name in NEED_DTYPE and "dtype" not in given):
            yield node.lineno, name


def test_every_tensor_names_device_and_dtype():
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := list(unnamed(ast.parse(path.read_text()))))
    }
    assert found == {}


def test_the_check_finds_them():
    source = "torch.zeros(3, dtype=d)\ntorch.tensor(1, device=c)\ntorch.empty(3, dtype=d, device=c)\nx.new_zeros(2)"
    assert list(unnamed(ast.parse(source))) == [(1, "zeros"), (2, "tensor")]


IMPORTED_INSIDE = """
    import importlib, os, pkgutil, sys
    import torch

    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        import commhooks
        for module in pkgutil.walk_packages(commhooks.__path__, "commhooks."):
            if "horovod" not in module.name and "__main__" not in module.name:
                importlib.import_module(module.name)
    from test_factories import everything
    from launch import spawn_gloo

    torch.set_num_threads(1)
    for outcome in spawn_gloo(everything, 3, (True,)):
        for name, values in outcome.items():
            print(name, values)
"""


def everything(rank, size, elsewhere):
    """Results of a part of the library, as lists by name; ``elsewhere``: under other defaults of device and dtype."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from commhooks import averaging, register
    from commhooks.planner.probe import probe
    from commhooks.schemes import make_parts

    cpu, single = torch.device("cpu"), torch.float32
    found = {}

    def data(numel, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(numel, generator=generator, dtype=single, device=cpu)

    class Model(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.w = nn.Parameter(torch.ones(40, dtype=dtype, device=cpu))
            self.register_buffer("b", torch.full((3,), float(rank), dtype=single, device=cpu))

        def forward(self, g):
            return (self.w * g.to(self.w.dtype)).sum()

    jobs = []
    for scheme in ("topk", "gtopk", "randomk", "threshold", "dense"):
        for dtype in (single, torch.bfloat16):
            memory = commhooks.ErrorFeedback(momentum=0.5 if scheme != "randomk" else 0.0, clip_norm=5.0)
            state = commhooks.SparseState(
                *make_parts(scheme, 0.1, memory=memory),
                dense_crossover=False,
                nonfinite="skip",
                delta_every=1,
            )
            jobs.append((f"{scheme} {dtype}", DistributedDataParallel(Model(dtype)), state))
    inputs = [data(40, 10 * step + rank) for step in range(3)]
    owned = {name: nn.Parameter(data(5, 0)) for name in ("local", "block")}
    output = averaging.OutputAverage([owned["block"]], averaging.Uniform())
    averagers = {
        "local": averaging.LocalSGD(2),
        "block": averaging.BlockMomentum(0.5, 2, params=[owned["block"]]),
    }
    if elsewhere:
        torch.set_default_device("meta")
    for name, ddp, state in jobs:
        register(ddp, state)
        for number, g in enumerate(inputs):
            ddp.zero_grad()
            ddp(g * float("inf") if number == 1 and rank == 1 else g).backward()
            found[f"{name} {number}"] = [round(float(x), 5) for x in ddp.module.w.grad]
        saved, norm = state.state_dict(), state.stats()["residual_norm"]
        found[name] = [round(norm, 4), *(round(float(x), 4) for r in saved["residual"].values() for x in r)]
        state.load_state_dict(saved)
        state.close()
    for name, averager in averagers.items():
        p = owned[name]
        for step in range(4):
            p.data += rank + step
            averager.average_parameters([p])
        found[name] = p.tolist()
    output.update()
    with output.applied():
        found["output"] = p.tolist()
    state = commhooks.SparseState.topk(0.1)
    state.open()
    costs = probe(state.reducer.transport, 1 << 12)
    assert costs.message_s >= 0.0
    state.close()
    return found


def test_other_defaults_change_nothing():
    """The default device and dtype are others, and the package was imported under another device."""
    expected = "".join(
        f"{name} {values}\n"
        for outcome in spawn_gloo(everything, 3, (False,))
        for name, values in outcome.items()
    )
    done = run([sys.executable, "-c", textwrap.dedent(IMPORTED_INSIDE)], timeout=120.0)
    assert done.stdout == expected, done.stderr
