"""How far drawn pictures are from real ones, as the field counts it: FID and KID of their features, by torchmetrics.

FID: Heusel et al. 2017, arXiv 1706.08500. KID: Binkowski et al. 2018, arXiv 1801.01401; cubic kernel, unbiased.

Axes: N pictures, C features.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Below as many pictures as there are features the covariance has no full rank, and FID is far above what more pictures
# would give; 10,000 or 50,000 are what papers take.
ENOUGH_FOR_FID = 2048
_KID_SUBSETS, _KID_SUBSET = 100, 1000  # as published


@dataclass(frozen=True)
class Fidelity:
    real: int  # pictures
    drawn: int
    fid: float
    kid: float  # mean over random subsets
    kid_spread: float  # standard deviation of the subsets; 0 where there are too few pictures for more than one


class _AsGiven(nn.Module):
    """Stands where torchmetrics has a network: the features are computed once, for both figures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_NC: Tensor) -> Tensor:
        return features_NC


def fidelity(real_NC: Tensor, drawn_NC: Tensor) -> Fidelity:
    """The same features give the same figures, KID's subsets too. ValueError for fewer than 2 pictures of a kind."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds, for one figure of one job
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(real_NC), len(drawn_NC))
    if fewest < 2:
        raise ValueError(
            f"FID and KID need 2 pictures at least: got {len(real_NC)} real ones and {len(drawn_NC)} drawn"
        )
    subset = min(fewest, _KID_SUBSET)
    # With all pictures in it each subset would be the same.
    subsets = _KID_SUBSETS if subset < max(len(real_NC), len(drawn_NC)) else 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")  # that it keeps the features: it must
        torch.manual_seed(0)
        frechet = FrechetInceptionDistance(feature=_AsGiven(real_NC.shape[1])).set_dtype(torch.float64)
        kernel = KernelInceptionDistance(_AsGiven(real_NC.shape[1]), subsets=subsets, subset_size=subset)
        for features_NC, real in ((real_NC, True), (drawn_NC, False)):
            frechet.update(features_NC.double(), real=real)
            kernel.update(features_NC.double(), real=real)
        mean, spread = kernel.compute()
        return Fidelity(len(real_NC), len(drawn_NC), float(frechet.compute()), float(mean), float(spread))
