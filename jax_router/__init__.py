"""Fused Mixture-of-Experts routing for JAX."""

from jax_router import presets as presets
from jax_router._balance import quantile_bias as quantile_bias
from jax_router._balance import quantile_histogram as quantile_histogram
from jax_router._balance import update_bias as update_bias
from jax_router._blocks import BlockPlan as BlockPlan
from jax_router._blocks import plan_blocks as plan_blocks
from jax_router._cutoff import route_with_cutoff as route_with_cutoff
from jax_router._dense import route_dense as route_dense
from jax_router._losses import load_balance_loss as load_balance_loss
from jax_router._losses import z_loss as z_loss
from jax_router._native import DISABLE_JAX_EXPORT_CHECKS as DISABLE_JAX_EXPORT_CHECKS
from jax_router._options import DenseRouting as DenseRouting
from jax_router._options import Groups as Groups
from jax_router._options import RouterStats as RouterStats
from jax_router._options import Routing as Routing
from jax_router._permute import combine as combine
from jax_router._permute import permute as permute
from jax_router._plan import Plan as Plan
from jax_router._plan import plan as plan
from jax_router._replicas import assign_replicas as assign_replicas
from jax_router._route import route as route
from jax_router._route_blocks import max_fused_tokens as max_fused_tokens
from jax_router._route_blocks import route_and_plan_blocks as route_and_plan_blocks
from jax_router._scores import aux_scores as aux_scores
from jax_router._stats import route_with_stats as route_with_stats
