"""FID and KID between features of real and drawn pictures, computed by torchmetrics.

FID: Heusel et al. 2017, arXiv 1706.08500. KID: Binkowski et al. 2018, arXiv 1801.01401; cubic kernel, unbiased.

Axes: N pictures, C features.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# With fewer pictures than features the covariance is singular, and FID is far too high. Papers use 10,000 or 50,000.
ENOUGH_FOR_FID = 2048
_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000  # as published


@dataclass(frozen=True)
class Fidelity:
    real: int  # pictures
    drawn: int  # pictures
    fid: float
    kid: float  # mean over random subsets
    kid_spread: float  # standard deviation over the subsets; 0 if there is only one


def fidelity(real_NC: Tensor, drawn_NC: Tensor) -> Fidelity:
    """Deterministic, including KID's subsets. Raises ValueError for fewer than 2 real or drawn pictures."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(real_NC), len(drawn_NC))
    if fewest < 2:
        raise ValueError(f"FID and KID need at least 2 pictures: got {len(real_NC)} real and {len(drawn_NC)} drawn")
    size = min(fewest, _KID_SUBSET_SIZE)
    # Subsets of all pictures would be the same.
    subsets = _KID_SUBSETS if size < max(len(real_NC), len(drawn_NC)) else 1
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")  # about memory for the features
        torch.manual_seed(0)
        identity = nn.Identity()  # instead of a network: features are computed once for both metrics
        identity.num_features = real_NC.shape[1]  # type: ignore[assignment]
        fid = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
        kid = KernelInceptionDistance(identity, subsets=subsets, subset_size=size)
        for features_NC, real in ((real_NC, True), (drawn_NC, False)):
            fid.update(features_NC.double(), real=real)
            kid.update(features_NC.double(), real=real)
        mean, spread = kid.compute()
        return Fidelity(len(real_NC), len(drawn_NC), float(fid.compute()), float(mean), float(spread))
