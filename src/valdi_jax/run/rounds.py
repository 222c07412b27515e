"""Rounds of episodes under way, while earlier ones are learnt from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from valdi_jax.data.collector import Collector, Interrupt, Round, Ticket
from valdi_jax.data.rollout import Rollout
from valdi_jax.data.source import Progress, Source
from valdi_jax.run.learner import Learner


class Rounds:
    """The rounds of a run, taken in the order of their numbers.

    With a lag of 0 a round is driven within `finish`. Else `start` keeps ``lag`` rounds under way,
    so that each plans with the parameters after the updates owed by the rounds before the last
    ``lag``.

    Args:
        source: whose episodes they are.
        learner: whose parameters they plan with.
        collector: who drives them.
        under_way: rounds that were under way when the run was saved.
    """

    def __init__(
        self,
        source: Source,
        learner: Learner,
        collector: Collector,
        under_way: Sequence[Round] = (),
    ):
        self._source, self._learner, self._collector = source, learner, collector
        self._lag = source.config.collect.lag
        self._lost = 0  # processes, already reported
        total = source.config.collect.episodes  # may be fewer than when they were begun
        kept = (each for each in under_way if each.numbers.stop <= total)
        self._pending = deque((each, self._submit(each)) for each in kept)

    @property
    def under_way(self) -> list[Round]:
        """Rounds whose parameters the learner may no longer have."""
        return [each for each, _ in self._pending]

    def next(self, progress: Progress) -> range:
        """Numbers of the round to finish next."""
        if self._pending:
            return self._pending[0][0].numbers
        return self._source.next_round(progress.episodes)

    def start(self, progress: Progress) -> None:
        """Start the rounds that plan with the parameters as they are."""
        first = self._pending[-1][0].numbers.stop if self._pending else progress.episodes
        params = None
        while len(self._pending) < self._lag and (numbers := self._source.next_round(first)):
            params = params or self._learner.snapshot()
            started = Round(numbers, self._learner.updates, params)
            self._pending.append((started, self._submit(started)))
            first = numbers.stop

    def finish(
        self, progress: Progress, metrics: dict[str, float], interrupt: Interrupt
    ) -> list[Rollout]:
        """The episodes of the next round; adds to the ``metrics`` of their records.

        Until `counted` the round stays under way, so that an error in between does not lose it.
        """
        if self._lag:
            ticket = self._pending[0][1]
            rollouts = self._collector.result(ticket, interrupt)
        else:
            with self._learner.planning() as params:
                current = Round(self.next(progress), self._learner.updates, params)
                ticket = self._submit(current)
                rollouts = self._collector.result(ticket, interrupt)
        if rollouts:
            metrics["plan/version_lag"] = self._learner.updates - ticket.version
        return rollouts

    def counted(self) -> None:
        """The finished round is part of the run's progress."""
        if self._lag:
            self._pending.popleft()

    def notices(self) -> list[str]:
        """Messages since the last call."""
        before, self._lost = self._lost, self._collector.lost
        if self._lost == before:
            return []
        return [f"warning: collectors lost: {self._lost - before}; others drove their episodes"]

    def _submit(self, each: Round) -> Ticket:
        jobs = self._source.jobs(each.numbers)
        noise_std = self._source.noise_std(each.numbers[0])
        return self._collector.submit(each.params, each.version, jobs, noise_std)
