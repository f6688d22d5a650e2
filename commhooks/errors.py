"""The exceptions commhooks raises at run time (bad arguments raise ``ValueError`` or ``TypeError``)."""


class CommHooksError(RuntimeError):
    """Base of every run-time error of commhooks."""


class PeerTimeoutError(CommHooksError):
    """A peer did not answer within the timeout. The message names this rank, the peer and the bucket."""


class PeerLostError(CommHooksError):
    """The connection to a peer broke, most likely because its process died."""


class SettingsMismatchError(CommHooksError, ValueError):
    """Ranks disagree on settings or bucket sizes. The message shows both values and their ranks."""


class NonFiniteGradientError(CommHooksError):
    """A gradient holds NaN or Inf and the policy is ``"error"``."""


class StepOrderError(CommHooksError):
    """Backward, ``zero_grad``, ``no_sync`` and ``step`` come in an order in which gradients would count twice or not at all."""
