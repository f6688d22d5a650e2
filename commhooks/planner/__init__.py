"""Planner: measures network and device, and chooses scheme, density and bucket size by a cost model."""

from .cost_model import Costs, exchange_s, step_s
from .measured import PROBE_TIMEOUT_S, measured_plan, plan_for, sizes_of
from .plan import ADAPTIVE, BUCKET_MB, DENSITIES, SAFE, Job, Plan, choose, settle
from .probe import probe

__all__ = [
    "ADAPTIVE",
    "BUCKET_MB",
    "DENSITIES",
    "PROBE_TIMEOUT_S",
    "SAFE",
    "Costs",
    "Job",
    "Plan",
    "choose",
    "exchange_s",
    "measured_plan",
    "plan_for",
    "probe",
    "settle",
    "sizes_of",
    "step_s",
]
