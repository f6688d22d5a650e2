"""Speed is measured with the native kernels, or not at all."""

from __future__ import annotations

from commhooks.native import abi


def why_not() -> str | None:
    """None where the CPU kernels are in use, otherwise the line that says what to do."""
    if abi.cpu() is not None:
        return None
    reason = "turned off by COMMHOOKS_NATIVE" if not abi.enabled() else f"not at {abi.path('cpu')}"
    return (
        f"the native kernels are not in use ({reason}), and the torch operators in their place are slower. "
        "`scripts/setup` builds them; --allow-reference measures the torch operators"
    )
