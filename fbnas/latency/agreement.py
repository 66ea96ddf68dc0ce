"""How well predictions of latency agree with measurements."""

import math
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Predictions against measurements of the same networks.

    `bias`: mean of predicted / measured. `mean_error`: mean of |predicted / measured - 1|.
    `spearman`, `kendall`: rank correlations, nan where all predictions are equal or only one is.
    """

    networks: int
    bias: float
    mean_error: float
    spearman: float
    kendall: float

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the form of an agreement in result.json: null for what is not a number."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}

    def header(self) -> dict[str, str]:
        """Return what a table's header says of it; of one network there is no order."""
        ranks = {"calibration_spearman": f"{self.spearman:.4f}"}
        return {
            "calibration_error": f"{self.mean_error:.4f}",
            **(ranks if math.isfinite(self.spearman) else {}),
        }

    def __str__(self) -> str:
        return (
            f"bias {self.bias:.3f}, mean error {100 * self.mean_error:.1f} %, Spearman "
            f"{self.spearman:.3f}, Kendall {self.kendall:.3f}"
        )


def agreement(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> Agreement:
    """Compare predictions with measurements, (networks,) each.

    Raises:
        ValueError: no networks, or not as many of both.
    """
    from scipy.stats import kendalltau, spearmanr

    if len(predicted_ms) != len(measured_ms) or len(measured_ms) == 0:
        raise ValueError(
            f"{len(predicted_ms)} predictions and {len(measured_ms)} measurements; expected as "
            "many of both, at least one"
        )
    ratio = np.asarray(predicted_ms) / np.asarray(measured_ms)
    spearman = kendall = float("nan")
    if len(ratio) > 1 and np.ptp(predicted_ms) > 0 and np.ptp(measured_ms) > 0:
        spearman = float(spearmanr(predicted_ms, measured_ms).statistic)
        kendall = float(kendalltau(predicted_ms, measured_ms).statistic)
    return Agreement(
        len(ratio), float(ratio.mean()), float(np.abs(ratio - 1).mean()), spearman, kendall
    )
