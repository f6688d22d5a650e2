"""Averagers: ranks step locally, and average models (and momenta) at some steps, or among neighbours."""

from . import topology
from .averager import Averager
from .block_momentum import BlockMomentum
from .checkpoints import average_checkpoints
from .decentralized import DecentralizedMomentum
from .diloco import DiLoCo
from .learning_rates import ConvexLR, LocalSGDLR, NonConvexLR, PowerLR, StronglyConvexLR, suggest_shift
from .local_hook import PostLocalState, local_hook, post_local_hook
from .local_sgd import LocalSGD
from .m_avg_theory import BlockAdvice, MAvgProblem, suggest_block_period, suggest_mu
from .optimizer import AveragedOptimizer
from .output_average import LastHalf, OutputAverage, Quadratic, Uniform
from .restarted_momentum import RestartedMomentum
from .slowmo import SlowMo
from .stagewise import Stagewise
from .sync_sets import (
    AtSteps,
    Every,
    Growing,
    OneShot,
    PostLocal,
    SyncSet,
    suggest_period,
    suggest_restart_period,
)
from .topology import Topology

__all__ = [
    "AtSteps",
    "AveragedOptimizer",
    "Averager",
    "BlockAdvice",
    "BlockMomentum",
    "ConvexLR",
    "DecentralizedMomentum",
    "DiLoCo",
    "Every",
    "Growing",
    "LastHalf",
    "LocalSGD",
    "LocalSGDLR",
    "MAvgProblem",
    "NonConvexLR",
    "OneShot",
    "OutputAverage",
    "PostLocal",
    "PostLocalState",
    "PowerLR",
    "Quadratic",
    "RestartedMomentum",
    "SlowMo",
    "Stagewise",
    "StronglyConvexLR",
    "SyncSet",
    "Topology",
    "Uniform",
    "average_checkpoints",
    "local_hook",
    "post_local_hook",
    "suggest_block_period",
    "suggest_mu",
    "suggest_period",
    "suggest_restart_period",
    "suggest_shift",
    "topology",
]
