"""How the pages call schemes, models and networks."""

from __future__ import annotations

NETWORKS = {"10gbit": "10 Gbit/s", "1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s", "10mbit": "10 Mbit/s"}
MODELS = {
    "resnet20": "ResNet-20, 0.27M",
    "vgg16": "VGG-16, 14.7M",
    "resnet50": "ResNet-50, 25.6M",
    "lstm1500": "LSTM, 66M",
}
SCHEMES = {
    "none": "no communication",
    "dense": "dense all-reduce",
    "fp16": "fp16 hook",
    "bf16": "bf16 hook",
    "powersgd1": "PowerSGD rank 1",
    "powersgd2": "PowerSGD rank 2",
    "powersgd4": "PowerSGD rank 4",
    "topk": "top-k, all-gather",
    "gtopk": "gTop-k, doubling",
    "gtopk-tree": "gTop-k, tree",
    "randomk": "random-k",
    "auto": "auto",
    "topk-mpi": "top-k over MPI",
    "gtopk-mpi": "gTop-k over MPI",
    "gtopk-tree-mpi": "gTop-k, tree, over MPI",
    "randomk-mpi": "random-k over MPI",
}
