"""What version 0.1 saved loads: pickled states, by the old module paths, and state_dict files; old imports warn."""

import copy
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from commhooks import SparseState, moved
from commhooks.averaging import averager

DATA = Path(__file__).resolve().parents[1] / "data" / "v0.1"
EXPECTED = torch.load(DATA / "expected.pt")
CASES = sorted(EXPECTED["cases"])


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def next_step(state):
    """The next gradient of the run that was saved, reduced by ``state``; and its ``state_dict`` before that."""
    p, q = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(7))
    state.set_names([("p", p), ("q", q)])
    before = state.state_dict()
    buffer = EXPECTED["gradients"][3].clone()
    state.submit(buffer, 0, (p, q), True).wait()
    state.close()
    return before, buffer


def assert_goes_on(state, name):
    before, after = next_step(state)
    case = EXPECTED["cases"][name]
    assert before["step"] == case["state_dict"]["step"] == 3
    for kind in ("residual", "velocity"):
        saved = {} if name == "no_memory" else case["state_dict"][kind]  # such a state keeps nothing
        assert before[kind].keys() == saved.keys()
        assert all(torch.equal(before[kind][key], saved[key]) for key in saved)
    assert torch.equal(after, case["next"])


@pytest.mark.parametrize("name", CASES)
def test_a_pickled_state_of_0_1_goes_on_bit_for_bit(name, group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        state = torch.load(DATA / f"{name}.pickle.pt", weights_only=False)
    assert_goes_on(state, name)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_of_0_1_goes_on_bit_for_bit(name, group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fresh = torch.load(DATA / f"{name}.pickle.pt", weights_only=False)
    reducer = fresh.reducer
    memory = copy.deepcopy(reducer.memory)  # a memory has one state
    state = SparseState(reducer.selector, reducer.aggregator, memory, dense_crossover=reducer.dense_crossover)
    state.load_state_dict(torch.load(DATA / f"{name}.state.pt", weights_only=True))
    assert_goes_on(state, name)


@pytest.mark.parametrize("old", sorted(moved.MOVED))
def test_an_old_module_path_imports_and_warns(old):
    if old.startswith("horovod"):
        pytest.importorskip("horovod.torch")
    sys.modules.pop(f"commhooks.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"commhooks.{moved.MOVED[old]}"):
        importlib.import_module(f"commhooks.{old}")


@pytest.mark.parametrize(
    "name", [*moved.RENAMED, "averaging.base.Averager", "selectors.TopK", "state.SparseState"]
)
def test_an_old_name_is_the_new_one(name):
    module, _, attribute = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = getattr(importlib.import_module(f"commhooks.{module}"), attribute)
    new, _, attribute = moved.RENAMED.get(name, f"{moved.MOVED[module]}.{attribute}").rpartition(".")
    assert found is getattr(importlib.import_module(f"commhooks.{new}"), attribute)
    assert averager.Averager is not None


def test_a_name_that_never_was_is_an_attribute_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("commhooks.selectors")
    with pytest.raises(AttributeError, match="BottomK"):
        _ = module.BottomK


def test_importing_the_package_imports_no_old_path():
    program = "import sys, commhooks; from commhooks import moved; print([m for m in moved.MOVED if f'commhooks.{m}' in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == "[]"
