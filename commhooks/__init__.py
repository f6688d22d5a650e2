"""commhooks: cheap gradient communication for data-parallel training. The public names, nothing else."""

from .aggregators import AllGather, Dense, GTopK, SharedIndices
from .arrays import merge, topk
from .bucket import Bucket
from .errors import (
    CommHooksError,
    NonFiniteGradientError,
    PeerLostError,
    PeerTimeoutError,
    SettingsMismatchError,
)
from .hooks import prime_layout, register, sparse_hook
from .memory import ErrorFeedback
from .reducer import Reducer
from .schedules import ConstantDensity, ExponentialWarmup
from .selectors import RandomK, ThresholdTopK, TopK
from .sparse import SparseGrad
from .state import SparseState

__version__ = "0.1.0"

__all__ = [
    "AllGather",
    "Bucket",
    "CommHooksError",
    "ConstantDensity",
    "Dense",
    "ErrorFeedback",
    "ExponentialWarmup",
    "GTopK",
    "NonFiniteGradientError",
    "PeerLostError",
    "PeerTimeoutError",
    "RandomK",
    "Reducer",
    "SettingsMismatchError",
    "SharedIndices",
    "SparseGrad",
    "SparseState",
    "ThresholdTopK",
    "TopK",
    "merge",
    "prime_layout",
    "register",
    "sparse_hook",
    "topk",
]
