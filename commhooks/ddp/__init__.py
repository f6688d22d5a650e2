"""The way in for DistributedDataParallel: the state, the hook and the communication thread."""
