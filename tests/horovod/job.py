"""Started on every rank by test_jobs.py: `job.py FOLDER`, or one module of cases: `job.py FOLDER stock_cases`."""

import importlib
import os
import sys

MODULES = ("stock_cases", "stock_failure_cases", "optimizer_cases", "optimizer_state_cases", "step_cases")


def main():
    import torch

    torch.set_num_threads(1)
    import gentle_waits
    import horovod.torch as hvd
    import jobs_sets

    gentle_waits.install()

    size = int(os.environ["COMMHOOKS_TEST_RANKS"])
    if size >= 3:
        jobs_sets.CHOSEN = hvd.ProcessSet([0, size - 1])
        hvd.init(process_sets=[jobs_sets.CHOSEN])
    else:
        hvd.init()
    assert hvd.size() == size
    import common

    for module in sys.argv[2:] or MODULES:
        importlib.import_module(module)
    common.run_cases(sys.argv[1])


if __name__ == "__main__":
    main()
