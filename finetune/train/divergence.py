"""Detect a run that diverges, or is about to, from the averages of each tick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.errors import TrainingError
from finetune.train.state import TrainState

MAX_SCORE = 500.0  # of D, averaged over a tick; healthy runs stay below 50
MAX_SIGN = 0.98  # mean sign of D on real and fake images that means perfect separation
PERFECT_TICKS = 3
MAX_OVERFLOW = 0.1  # fraction of the steps of a tick whose gradients may overflow
MAX_P = 0.99  # ADA's probability that counts as its limit
FAR = 10.0  # times the largest recent distance between student and teacher
SETTLED = 3  # half-lives of G_ema after which its distance from G is meaningful
RECENT_TICKS = 5  # needed at least to compare with

REMEDY = "Try a smaller --glr and --dlr, a larger --gamma, or --precision fp32."


class Diverged(TrainingError):
    """Training diverged."""

    def __init__(self, what: str) -> None:
        super().__init__(what, hint=f"The last saved state is intact. {REMEDY}")


@dataclass(frozen=True)
class Alarm:
    """An event of training: `kind` for programs, `what` for the user, and the numbers behind it.

    `is_divergence`: training does not recover from it by itself.
    """

    kind: str
    what: str
    numbers: dict[str, Any]
    is_divergence: bool = False


class DivergenceMonitor:
    """Checks the averages of each tick. A lasting condition is reported once, and again if it returns.

    ema_nimg: half-life of G_ema. The distance between student and teacher is compared only after three
    half-lives: it starts at 0 from scratch, and at that between G and G_ema of a checkpoint.
    """

    def __init__(self, ema_nimg: float = 0.0) -> None:
        self.ema_nimg = ema_nimg
        self.restart(0)

    def restart(self, nimg: int) -> None:
        """Forget all ticks: training continues at `nimg` images."""
        self.settled_nimg = nimg + SETTLED * self.ema_nimg
        self.distances: list[float] = []
        self.perfect_ticks = 0
        self.reported: set[str] = set()

    def check(self, state: TrainState, numbers: dict[str, Any]) -> list[Alarm]:
        """Return what is new in this tick."""
        found = [
            *self._scores(numbers),
            *self._overflows(numbers),
            *self._distance(state, numbers),
            *self._overpowered(numbers),
            *self._cap(state),
        ]
        new = [alarm for alarm in found if alarm.is_divergence or alarm.kind not in self.reported]
        self.reported = {alarm.kind for alarm in found}
        return new

    def _scores(self, numbers: dict[str, Any]) -> list[Alarm]:
        scores: dict[str, Any] = {
            name: numbers[name] for name in ("score_real", "score_fake") if name in numbers
        }
        if not scores or max(map(abs, scores.values())) <= MAX_SCORE:
            return []
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        return [Alarm("score-explosion", f"The scores of D exploded: {text}.", scores, True)]

    def _overflows(self, numbers: dict[str, Any]) -> list[Alarm]:
        shares: dict[str, Any] = {
            name: numbers[name] for name in ("overflow_G", "overflow_D") if numbers.get(name)
        }
        if not shares:
            return []
        which = " and ".join(f"{share:.1%} of the steps of {name[-1]}" for name, share in shares.items())
        what = f"Gradients overflowed in float16: {which} were taken with zero gradients."
        return [Alarm("overflow", what, shares, max(shares.values()) > MAX_OVERFLOW)]

    def _distance(self, state: TrainState, numbers: dict[str, Any]) -> list[Alarm]:
        if "loss_sd" not in numbers or state.nimg < self.settled_nimg:
            return []
        distance, before = numbers["loss_sd"], self.distances[-2 * RECENT_TICKS :]
        if len(before) >= RECENT_TICKS and distance > FAR * max(before):
            what = f"G diverged from its teacher: distance {distance:.4g} (previous max {max(before):.4g})."
            return [Alarm("student-left-teacher", what, {"loss_sd": distance, "before": max(before)}, True)]
        self.distances = [*before, distance]
        return []

    def _overpowered(self, numbers: dict[str, Any]) -> list[Alarm]:
        real, fake = numbers.get("sign_real", 0.0), numbers.get("sign_fake", 0.0)
        self.perfect_ticks = self.perfect_ticks + 1 if real > MAX_SIGN and fake < -MAX_SIGN else 0
        if self.perfect_ticks < PERFECT_TICKS:
            return []
        what = (
            f"D separates real and fake perfectly ({self.perfect_ticks} ticks, sign {real:.2f}, {fake:.2f}): "
            "G learns little. Try a larger --gamma, a smaller --dlr or --aug ada. Small data sets cause this."
        )
        return [Alarm("d-overpowers-g", what, {"sign_real": real, "sign_fake": fake})]

    def _cap(self, state: TrainState) -> list[Alarm]:
        if state.augment_pipe is None or state.ada.target is None or state.ada.p < MAX_P:
            return []
        what = (
            f"ADA is at its limit (p {state.ada.p:.2f}) and D still overfits. Use more images or --mirror, a "
            "smaller --dlr, or an earlier snapshot."
        )
        return [Alarm("ada-at-cap", what, {"p": state.ada.p})]
