"""Our optimizer over process sets that gloo has to open from nothing, at 3 ranks: run by test_jobs.py.

Rank 2 is in all of them: {1, 2} is opened, {2} lies within it, {0, 2} does not and is refused on both its ranks.
An elastic State takes none of them.
"""

import time


def main():
    import gentle_waits
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    gentle_waits.install()
    pair, alone, other = (hvd.ProcessSet(ranks) for ranks in ([1, 2], [2], [0, 2]))
    hvd.init(process_sets=[pair, alone, other])
    import torch.distributed as dist
    from common import close, flat, oracle, raises, train

    from commhooks import AllGather, PeerTimeoutError, SparseState, TopK
    from commhooks.horovod import Compression, DistributedOptimizer

    def refuse_elastic(**values):  # on every rank, also those outside the set: nobody is left waiting
        raises(ValueError, "process_set must hold all 3 ranks", lambda: hvd.elastic.TorchState(**values))

    def over(process_set, timeout_s=20.0):
        def make(model, optimizer):
            state = SparseState(TopK(0.1), AllGather(), dense_crossover=False, timeout_s=timeout_s)
            groups = [[p] for p in model.parameters()]  # selects per parameter, as the oracle does
            return DistributedOptimizer(
                optimizer, model.named_parameters(), state=state, groups=groups, process_set=process_set
            )

        return make

    assert not dist.is_initialized()
    for process_set in (pair, pair, alone):  # the second time the group of the first is used
        model, optimizer = train(over(process_set))
        ranks = process_set.ranks if process_set.included() else [hvd.rank()]
        density = 0.1 if process_set.included() else 1.0
        close(flat(model), oracle("topk", density, ranks)[0])
        assert dist.is_initialized() == pair.included()
        refuse_elastic(optimizer=optimizer)
        refuse_elastic(compression=Compression.topk(0.1, model.named_parameters(), process_set=process_set))
    if other.included():
        started = time.monotonic()
        raises(ValueError, "process_set", lambda: train(over(other)))
        assert time.monotonic() - started < 10.0  # told by the other rank, not by a timeout
    if hvd.rank() == 1:  # rank 2 never comes
        raises(PeerTimeoutError, "opening a gloo group", lambda: train(over(pair, timeout_s=1.0)))
    hvd.barrier()
    print(f"rank {hvd.rank()} is through", flush=True)


if __name__ == "__main__":
    main()
