"""Watch-dogs: what goes wrong in training, recognised from its numbers and given a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.errors import TrainingError
from finetune.train.state import TrainState

LARGEST_SCORE = 500.0  # of D, averaged over a tick; healthy runs stay below 50
SURE = 0.98  # mean sign of D on both sides from which on D has won
SURE_TICKS = 3
CAP = 0.99  # of ADA's probability
MOST_OVERFLOWS = 0.1  # share of the steps of a tick whose gradients overflow, that training can do without
FAR = 10.0  # times the largest usual distance between student and teacher
USUAL_TICKS = 5  # that say what is usual, at least

WAYS_OUT = "Try a smaller --glr and --dlr, a larger --gamma, or --precision fp32."


class Diverged(TrainingError):
    """Training has gone where it does not come back from."""

    def __init__(self, kind: str, what: str, numbers: dict[str, Any]) -> None:
        super().__init__(what, hint=f"The last saved state is untouched. {WAYS_OUT}")
        self.kind = kind
        self.numbers = numbers


@dataclass(frozen=True)
class Alarm:
    """Something to tell: `kind` for machines, `what` for people, and the numbers that gave it away.

    `is_divergence`: training will not come back from it by itself.
    """

    kind: str
    what: str
    numbers: dict[str, Any]
    is_divergence: bool = False


@dataclass
class Guard:
    """Looks at the averages of each tick. What lasts is told once, and again when it comes back.

    settled_nimg: images until which student and teacher, who began equal, may still be drifting apart.
    """

    settled_nimg: float = 0.0
    distances: list[float] = field(default_factory=list)
    sure_ticks: int = 0
    told: set[str] = field(default_factory=set)

    def look(self, state: TrainState, numbers: dict[str, Any]) -> list[Alarm]:
        """What is wrong in this tick."""
        found = [
            *self._scores(numbers),
            *self._overflows(numbers),
            *self._distance(state, numbers),
            *self._overpowered(numbers),
            *self._cap(state),
        ]
        new = [alarm for alarm in found if alarm.is_divergence or alarm.kind not in self.told]
        self.told = {alarm.kind for alarm in found}
        return new

    def _scores(self, numbers: dict[str, Any]) -> list[Alarm]:
        scores = {name: numbers[name] for name in ("score_real", "score_fake") if name in numbers}
        if not scores or max(map(abs, scores.values())) <= LARGEST_SCORE:
            return []
        said = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        return [Alarm("score-explosion", f"The scores of D exploded: {said}.", scores, True)]

    def _overflows(self, numbers: dict[str, Any]) -> list[Alarm]:
        shares = {name: numbers[name] for name in ("overflow_G", "overflow_D") if numbers.get(name)}
        if not shares:
            return []
        said = " and ".join(f"{share:.1%} of the steps of {name[-1]}" for name, share in shares.items())
        what = f"Gradients overflowed in float16: {said} left the weights as they were."
        return [Alarm("overflow", what, shares, max(shares.values()) > MOST_OVERFLOWS)]

    def _distance(self, state: TrainState, numbers: dict[str, Any]) -> list[Alarm]:
        if "loss_sd" not in numbers or state.nimg < self.settled_nimg:
            return []
        distance, before = numbers["loss_sd"], self.distances[-2 * USUAL_TICKS :]
        if len(before) >= USUAL_TICKS and distance > FAR * max(before):
            what = (
                f"G left its average: a distance of {distance:.4g}, never more than {max(before):.4g} before."
            )
            return [Alarm("student-left-teacher", what, {"loss_sd": distance, "before": max(before)}, True)]
        self.distances = [*before, distance]
        return []

    def _overpowered(self, numbers: dict[str, Any]) -> list[Alarm]:
        real, fake = numbers.get("sign_real", 0.0), numbers.get("sign_fake", 0.0)
        self.sure_ticks = self.sure_ticks + 1 if real > SURE and fake < -SURE else 0
        if self.sure_ticks < SURE_TICKS:
            return []
        what = (
            f"D tells all pictures apart for {self.sure_ticks} ticks (signs {real:.2f} and {fake:.2f}): G "
            "learns little. More --gamma, a smaller --dlr or --aug ada help; few pictures are a cause."
        )
        return [Alarm("d-overpowers-g", what, {"sign_real": real, "sign_fake": fake})]

    def _cap(self, state: TrainState) -> list[Alarm]:
        if state.augment_pipe is None or state.ada.target is None or state.ada.p < CAP:
            return []
        what = (
            f"Augmentation is at its limit (p {state.ada.p:.2f}): D knows the pictures by heart all the same."
        )
        return [Alarm("ada-at-cap", what, {"p": state.ada.p})]
