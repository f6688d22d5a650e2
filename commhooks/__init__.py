"""commhooks: cheap gradient communication for data-parallel training. Only the public names are here."""

from . import moved
from .ddp.hook import register, sparse_hook
from .ddp.layout import prime_layout
from .ddp.state import SparseState
from .errors import (
    CommHooksError,
    NonFiniteGradientError,
    PeerLostError,
    PeerTimeoutError,
    SettingsMismatchError,
)
from .exchange import AllGather, Dense, GTopK, LowBit, SharedIndices
from .gradient.bucket import Bucket
from .gradient.sparse_grad import SparseGrad
from .interop.arrays import merge, topk
from .memory import ErrorFeedback, NoMemory
from .reduction.reducer import Reducer
from .selection.density import ConstantDensity, ExponentialWarmup
from .selection.selectors import RandomK, ThresholdTopK, TopK

__version__ = "0.1.0"

moved.install()

__all__ = [
    "AllGather",
    "Bucket",
    "CommHooksError",
    "ConstantDensity",
    "Dense",
    "ErrorFeedback",
    "ExponentialWarmup",
    "GTopK",
    "LowBit",
    "NoMemory",
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
