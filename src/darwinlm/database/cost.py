"""Predicted cost of the database."""

from darwinlm.config.stage import Stage
from darwinlm.estimate.work import LIBRARIES, StageCost, Work
from darwinlm.models.experts import OUTPUTS, PRODUCTS
from darwinlm.models.sites import Site

_SOLVER_UTILIZATION = 0.45
"""Fraction of the speed of large matrix products that the solver reaches."""
_DISK = 3e8
"""Disk bandwidth in bytes per second, flushed."""
_EXPERT_BYTES = 4 * (2 * PRODUCTS + OUTPUTS)
"""Bytes for the products of all experts' outputs on a sample of tokens, and for those changed by a removal."""


def predict_database(work: Work) -> StageCost:
    """Predict the forward passes, the Gram matrices, the solver, and writing of the columns."""
    tokens, levels, rows = work.recipe.data.calibration_tokens, work.recipe.database.levels, work.rows
    gram = sum(d**2 for d in work.columns) * tokens
    # The inverse is computed in float64, at half the speed.
    solving = sum((8 / 3 + 2 / 3) * d**3 + 2.5 * rows * d**2 for d in work.columns)
    solving += sum(_expert_work(site, rows, tokens, levels) for site in work.mixtures)
    stored = rows * (sum(work.columns) + work.expert_columns) * (levels - 1) / 2 * 2
    forward = work.before * work.layers * tokens * work.exact
    devices, accelerator = work.machine.devices, work.machine.accelerator
    # Inputs of a layer stay in CPU memory if there is an accelerator.
    activations = 0 if accelerator else tokens / devices * rows * 4
    experts = _EXPERT_BYTES + 12 * tokens * rows if work.mixtures else 0
    layer = 4 * work.before * work.in_sites / work.depth
    return StageCost(
        stage=Stage("database", work.number),
        seconds=(forward + (gram + solving / _SOLVER_UTILIZATION) * work.rates.product + stored / _DISK) / devices,
        memory=LIBRARIES + layer + activations + 7 * 4 * max(work.columns, default=0.0) ** 2 + experts,
        disk=stored,
    )


def _expert_work(site: Site, rows: int, tokens: int, levels: int) -> float:
    """Operations to prune a layer's experts: all of them on the sample, or each as a site of its own; plus, at each
    level, twice the forward passes of routed tokens, their Gram matrices and the eigenvalues of these."""
    experts = site.experts or site.num_units
    width = site.columns(site.num_units) // experts
    one = 6 * rows * width
    choosing = (
        tokens * site.routed * (one + 2 * width**2) + experts * (10 / 3 * width**3 + 2.5 * rows * width**2)
        if site.experts
        else min(tokens, PRODUCTS // experts**2) * (experts * one + 2 * experts**2 * rows)
    )
    refits = levels * tokens * site.routed * (2 * one + 4 * width**2 + 6 * width * rows)
    return float(choosing + refits + levels / 2 * experts * 25 * width**3)
