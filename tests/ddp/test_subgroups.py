"""A DDP over a part of the ranks averages over that part, or the raw hook says what to name."""

import pytest
import torch
import torch.distributed as dist
from launch import spawn_gloo
from step_models import W
from torch.nn.parallel import DistributedDataParallel

from commhooks import SparseState, register, sparse_hook


def state_of(dense=False, **options):
    if dense:
        return SparseState.dense(ddp_allreduce=True, **options)
    return SparseState.topk(1.0, dense_crossover=False, timeout_s=20.0, **options)


def average(rank, group, attach):
    """What a step on rank's own gradient, its number, gives."""
    model = DistributedDataParallel(W(1), process_group=group)
    state = attach(model)
    model(torch.tensor([float(rank)])).backward()
    state.close()
    return model.module.w.grad.item()


def raw(state):
    def attach(model):
        model.register_comm_hook(state, sparse_hook)
        return state

    return attach


def ranks(rank, size):
    results = {"world before": average(rank, None, raw(state_of()))}
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[rank // 2]
    for dense in (False, True):
        results["register", dense] = average(rank, mine, lambda model, d=dense: register(model, state_of(d)))
        results["named", dense] = average(rank, mine, raw(state_of(dense, process_group=mine)))
        world = state_of(dense, process_group=dist.group.WORLD)
        results["world named", dense] = average(rank, None, raw(world))
        for group in (mine, None):
            with pytest.raises((RuntimeError, ValueError), match="register.*process_group=") as caught:
                average(rank, group, raw(state_of(dense)))
            assert str([0, 1] if rank < 2 else [2, 3]) in str(caught.value)
    return results


def test_a_raw_hook_on_a_subgroup_does_not_average_over_all_ranks():
    for rank, results in enumerate(spawn_gloo(ranks, 4, timeout=90)):
        assert results.pop("world before") == 1.5
        for (how, dense), value in results.items():
            expected = 1.5 if how == "world named" else (0.5 if rank < 2 else 2.5)
            assert value == expected, (rank, how, dense)


def another_state(rank, size):
    """The group that a state of ours makes for a subgroup is not the program's."""
    pair = dist.new_group([0, 1])
    if rank < 2:
        first = state_of(process_group=pair)
        first.open()
        dist.destroy_process_group(pair)
    result = average(rank, None, raw(state_of()))
    if rank < 2:
        first.close()
    return result


def test_groups_of_our_own_do_not_count():
    assert spawn_gloo(another_state, 3, timeout=60) == [1.0] * 3
