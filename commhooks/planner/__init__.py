"""Planner: a cost model, a probe of network and device, and the choice of scheme, density and bucket size."""

from .cost_model import Costs, exchange_s, step_s
from .plan import Plan, choose
from .probe import probe

__all__ = ["Costs", "Plan", "choose", "exchange_s", "probe", "step_s"]
