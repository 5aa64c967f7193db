"""Detects steps whose gradient norm is an outlier among the recent ones.

A step is an outlier if

    log(norm) > median + threshold * max(1.4826 * MAD, 0.1)

over the logarithms of the last 128 finite gradient norms, where MAD is the median absolute deviation from the median.
OLMo 2 (arXiv 2501.00656) skips steps 6 standard deviations above the mean of the last 128. Median and MAD replace mean
and deviation because one spike of 1,000 times the norm would hide the next ones for 128 steps. The logarithm is taken
because gradient norms are positive and skewed: the limit is a factor, the same at every scale. 1.4826 * MAD is the
standard deviation of a normal distribution. Its floor of 0.1 keeps ordinary steps of a very even run: with a threshold
of 6 no step below 1.8 times the median is skipped. Only large norms are skipped; small ones do no harm.
"""

import torch
from torch import Tensor

WINDOW = 128  # finite gradient norms that are compared with
LEAST_HISTORY = WINDOW // 2  # with fewer no step is an outlier
_LEAST_DEVIATION = 0.1  # of log(norm)


class RecentNorms:
    """The last WINDOW finite gradient norms, on the device. The host never waits for it.

    Norms of skipped outliers are included: where the level has changed for good, the limit follows after half a window.
    """

    def __init__(self, device: torch.device) -> None:
        self.logs_W = torch.full((WINDOW,), torch.inf, device=device)  # inf: no entry yet
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # finite norms seen

    def limit(self, threshold: float) -> Tensor:
        """Largest gradient norm that is not an outlier: float32, 0-dim; inf while there is too little history."""
        middle = self._median(self.logs_W)
        deviation = 1.4826 * self._median((self.logs_W - middle).abs())
        limit = torch.exp(middle + threshold * deviation.clamp(min=_LEAST_DEVIATION))
        return torch.where(self.count < LEAST_HISTORY, torch.inf, limit)

    def add(self, norm: Tensor) -> None:
        """Appends a norm (0-dim) if it is finite. Changes no tensor in place."""
        finite = torch.isfinite(norm)
        slots_W = torch.arange(WINDOW, device=norm.device)
        here_W = finite & (slots_W == self.count % WINDOW)
        self.logs_W = torch.where(here_W, norm.float().clamp(min=1e-30).log(), self.logs_W)
        self.count = self.count + finite

    def tensors(self) -> dict[str, Tensor]:
        return {"recent_log_norms": self.logs_W, "recent_norms": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; removes them from the dict. Without them, as in older checkpoints, starts empty."""
        empty = RecentNorms(self.logs_W.device).tensors()
        loaded = {name: tensors.pop(name, tensor) for name, tensor in empty.items()}
        self.logs_W, self.count = (tensor.to(self.logs_W.device, copy=True) for tensor in loaded.values())

    def _median(self, values_W: Tensor) -> Tensor:
        """The lower median of the entries. torch.nanmedian would make the host wait for a GPU."""
        entries = self.count.clamp(1, WINDOW)
        return values_W.sort().values.gather(0, ((entries - 1) // 2).view(1))[0]
