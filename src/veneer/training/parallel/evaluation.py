"""An evaluation that several processes share: each team computes some of the groups of examples, and the sums are added."""

from __future__ import annotations

from torch import Tensor

from veneer.training.loop.step import Stepper
from veneer.training.parallel.processes import Processes


class EvaluationTeam:
    """The processes of an evaluation, as ``evaluate/losses.py`` knows them.

    Attributes:
        rank, size: number of this process's team, and of all teams.
    """

    def __init__(self, processes: Processes, stepper: Stepper) -> None:
        self.rank = processes.team
        self.size = processes.teams
        self._processes = processes
        self._stepper = stepper

    def add_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes."""
        return self._processes.add_(tensor)

    def fill_up(self, passes: int) -> None:
        """Run so many passes in place of groups, where all processes must run as many."""
        if self._stepper.shards is None:
            return
        for _ in range(passes):
            self._stepper.idle(backward=False)
        self._stepper.shards.free()

    def common_fault(self, error: Exception | None) -> Exception | None:
        """The same fault in every process, or None if none has any. In lockstep a fault ends the run."""
        if not self._processes.lockstep:
            return self._processes.common_fault(error)
        if error is not None:
            raise self._processes.fault_of_pass(error) from error
        return None
