"""Choice of the experts of a layer to remove, and refit of the remaining ones.

Tokens of a removed expert are routed to the next one, and their gates change. So the importance of an expert is not its
output, but how much the layer's output changes when its tokens are rerouted: with gates g of the whole layer, gates h
of the remaining experts, and f_e(x) the output of expert e, the error of a token is

    |sum_e (g_e - h_e) f_e|^2 = (g - h)^T K (g - h),    K_ef = f_e . f_f

K is computed once for a sample of tokens; then every removal is evaluated exactly, with the family's own gating, from
numbers of the size of the router. Experts are removed one by one, always the one whose removal changes the output
least. A score per expert (REAP, arXiv 2510.13999: the mean of g_e |f_e|) accounts neither for rerouting nor for
redundant experts.

At each size the output projections of the remaining experts are then refitted, one after another, to the remaining
error of the layer's output: ridge regression on the tokens of each expert, with the ridge chosen on held-out tokens.

Dimension letters: N tokens, M tokens of the sample, E experts, D hidden size, I channels of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darwinlm.database.grams import ExpertStatistics
from darwinlm.database.solver import Snapshot
from darwinlm.models.experts import OUTPUTS, PRODUCTS, Experts
from darwinlm.runtime.progress import log

_SLICE = 4096
"""Tokens processed at a time, except for the products."""
FEWEST_TOKENS = 32
"""Minimum number of tokens for the refit of an expert; fewer are unreliable."""
_HELD_OUT = 4
"""Every N-th token is held out to choose the ridge."""
_RIDGES = (1.0, 10.0, 100.0)
"""Candidate ridges, as multiples of the damping."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Experts of a layer on the calibration text."""

    x_ND: Tensor
    """Inputs of the layer's MLP."""
    logits_NE: Tensor
    """Logits of the router."""
    gates_NE: Tensor
    """Gate of each expert; 0 for experts that a token is not routed to."""
    wanted_ND: Tensor
    """Summed output of all experts."""
    weights_N: Tensor
    """Factor of each token's error before it is squared."""

    @classmethod
    def of(cls, experts: Experts, statistics: ExpertStatistics, name: str) -> "Routed":
        """Run the router and all experts, and warn about experts of the site `name` with few tokens."""
        device = experts.router_ED.device
        x_ND = statistics.inputs_ND.to(device, torch.float32)
        logits_NE = torch.cat([experts.logits(part_ND) for part_ND in x_ND.split(_SLICE)])
        gates_NE = experts.gates(logits_NE)
        rare = ((gates_NE > 0).sum(0) < FEWEST_TOKENS).nonzero()[:, 0].tolist()
        if rare:
            shown = ", ".join(map(str, rare[:8])) + (", …" if len(rare) > 8 else "")
            log.warning(
                "%s: %d of %d experts get fewer than %d of the %d calibration tokens (%s): provide more, or "
                    "more varied text", name, len(rare), experts.count, FEWEST_TOKENS, len(x_ND), shown,
            )  # fmt: skip
        return cls(
            x_ND=x_ND,
            logits_NE=logits_NE,
            gates_NE=gates_NE,
            wanted_ND=_sum_of(experts, x_ND, gates_NE),
            weights_N=1 / statistics.norms_N.to(device),
        )

    @property
    def removal_error(self) -> float:
        """Error of removing all experts of the layer."""
        return float((self.wanted_ND * self.weights_N[:, None]).square().sum(1).mean())


@torch.no_grad()
def prune_experts(
    experts: Experts, statistics: ExpertStatistics, *, sizes: Sequence[int], damping: float, name: str
) -> tuple[list[Snapshot], float]:
    """Remove experts one by one, and refit the remaining ones at each size.

    Args:
        experts: experts of the layer, float32, on the device to work on.
        statistics: their inputs on the calibration text.
        sizes: numbers of experts to keep, descending.
        damping: minimum ridge, relative to the mean of a Gram matrix's diagonal.
        name: name of the site, for log lines.

    Returns:
        One snapshot per size, with `weight_OK` of shape (kept experts, D, I) or as stored in the model; and the error
        of removing all experts.
    """
    routed = Routed.of(experts, statistics, name)
    sample = _sample(len(routed.x_ND), experts.count)
    order = removal_order(
        experts,
        routed.x_ND[sample],
        routed.logits_NE[sample],
        routed.weights_N[sample],
        experts.count - min(sizes, default=experts.count),
    )
    snapshots = []
    for size in sizes:
        gone = set(order[: experts.count - size])
        kept = tuple(expert for expert in range(experts.count) if expert not in gone)
        left = experts.some(kept)
        down_EDI, error = refit_experts(left, routed, routed.logits_NE[:, list(kept)], damping)
        snapshots.append(Snapshot(kept=kept, weight_OK=experts.as_stored(down_EDI), error=error))
    return snapshots, routed.removal_error


def removal_order(experts: Experts, x_MD: Tensor, logits_ME: Tensor, weights_M: Tensor, count: int) -> list[int]:
    """Return the first `count` experts to remove, each time the one that changes the layer's output least; ties go to
    the lowest index.

    Args:
        experts: experts of the layer.
        x_MD: their inputs.
        logits_ME: logits of the router.
        weights_M: factor of each token's error before it is squared.
        count: number of experts to remove; at least as many as each token is routed to must remain.
    """
    products_MEE = _products(experts, x_MD)
    whole_ME, logits_ME = experts.gates(logits_ME), logits_ME.clone()
    gates_ME, errors_M = whole_ME, torch.zeros_like(weights_M)
    gone: list[int] = []
    for _ in range(count):
        best: tuple[float, int] | None = None
        for expert in range(experts.count):
            if expert in gone:
                continue
            tokens = _tokens_moved(experts, gates_ME, expert)
            moved_ME = logits_ME[tokens]
            moved_ME[:, expert] = -torch.inf
            found = _errors(products_MEE[tokens], whole_ME[tokens] - experts.gates(moved_ME), weights_M[tokens])
            change = float((found - errors_M[tokens]).double().sum())
            if best is None or change < best[0]:
                best = change, expert
        assert best is not None
        gone.append(best[1])
        logits_ME[:, best[1]] = -torch.inf
        gates_ME = experts.gates(logits_ME)
        errors_M = _errors(products_MEE, whole_ME - gates_ME, weights_M)
    return gone


def _tokens_moved(experts: Experts, gates_ME: Tensor, expert: int) -> Tensor:
    """Return the tokens whose gates change when `expert` is removed: all of them if gates do not sum to 1."""
    if not experts.renormalized:
        return torch.arange(len(gates_ME), device=gates_ME.device)
    return gates_ME[:, expert].nonzero()[:, 0]


def _errors(products_MEE: Tensor, lacking_ME: Tensor, weights_M: Tensor) -> Tensor:
    """Return the squared error of each token."""
    squares_M = torch.einsum("me,mef,mf->m", lacking_ME, products_MEE, lacking_ME)
    return squares_M.clamp_min(0) * weights_M.square()


def _products(experts: Experts, x_MD: Tensor) -> Tensor:
    """Return the matrix K of each token: (M, E, E)."""
    size = max(1, OUTPUTS // (experts.count * x_MD.shape[1]))
    parts = []
    for part_MD in x_MD.split(size):
        outputs_MED = torch.stack([experts.output(expert, part_MD) for expert in range(experts.count)], dim=1)
        parts.append(outputs_MED @ outputs_MED.mT)
    return torch.cat(parts)


def _sample(tokens: int, experts: int) -> Tensor:
    """Return the indices of evenly spaced tokens, as many as fit in memory."""
    count = min(tokens, max(1, PRODUCTS // experts**2))
    return torch.arange(count) * tokens // count


def _sum_of(experts: Experts, x_ND: Tensor, gates_NE: Tensor) -> Tensor:
    pairs = zip(x_ND.split(_SLICE), gates_NE.split(_SLICE), strict=True)
    return torch.cat([experts.sum_of(part_ND, part_NE) for part_ND, part_NE in pairs])


def refit_experts(experts: Experts, routed: Routed, logits_NE: Tensor, damping: float) -> tuple[Tensor, float]:
    """Refit the remaining experts of a layer, one after another, to the remaining error of the layer's output.

    Args:
        experts: remaining experts, possibly narrowed.
        routed: the whole layer on the calibration text.
        logits_NE: router logits of the remaining experts.
        damping: minimum ridge, relative to the mean of a Gram matrix's diagonal.

    Returns:
        Their output projections, (E, D, I), and the squared error of the layer's output, averaged over tokens.
    """
    x_ND, wanted_ND, weights_N = routed.x_ND, routed.wanted_ND, routed.weights_N
    gates_NE = experts.gates(logits_NE)
    lacking_ND = (wanted_ND - _sum_of(experts, x_ND, gates_NE)) * weights_N[:, None]
    down_EDI = experts.down_EDI.clone()
    for expert in range(experts.count):
        rows = gates_NE[:, expert].nonzero()[:, 0]
        if len(rows) < FEWEST_TOKENS:
            continue
        channels_NI = experts.channels(expert, x_ND[rows]) * (gates_NE[rows, expert] * weights_N[rows])[:, None]
        change_DI = _ridge(channels_NI, lacking_ND[rows], damping)
        down_EDI[expert] += change_DI
        lacking_ND[rows] -= channels_NI @ change_DI.T
    return down_EDI, float(lacking_ND.square().sum(1).mean())


def _ridge(channels_NI: Tensor, lacking_ND: Tensor, damping: float) -> Tensor:
    """Return the change of an output projection, (D, I); zero if it would increase the error on held-out tokens."""
    held_out = torch.arange(len(channels_NI), device=channels_NI.device) % _HELD_OUT == 0
    fitted_MI, target_MD = channels_NI[~held_out], lacking_ND[~held_out]
    values_I, vectors_II = torch.linalg.eigh((fitted_MI.T @ fitted_MI).double())
    turned_ID = vectors_II.T @ (fitted_MI.T @ target_MD).double()
    unit = damping * float(values_I.mean().clamp_min(1e-12))
    best, least = None, float(lacking_ND[held_out].square().sum())
    for times in _RIDGES:
        change_ID = (vectors_II @ (turned_ID / (values_I.clamp_min(0) + times * unit)[:, None])).float()
        error = float((lacking_ND[held_out] - channels_NI[held_out] @ change_ID).square().sum())
        if error < least:
            best, least = times, error
    if best is None:
        return channels_NI.new_zeros(lacking_ND.shape[1], channels_NI.shape[1])
    # Refit on all tokens with the best ridge.
    gram_II = (channels_NI.T @ channels_NI).double()
    gram_II.diagonal().add_(best * damping * float(gram_II.diagonal().mean().clamp_min(1e-12)))
    factor_II = torch.linalg.cholesky(gram_II)
    return torch.cholesky_solve((channels_NI.T @ lacking_ND).double(), factor_II).T.float()
