"""DistributedDataParallel: the state, the hook and the thread that communicates."""
