"""Several models on one device: each has a policy of its own, and the one whose rows are most urgent goes first."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

from service.policy.state import Batch, Decision, Policy

Key = TypeVar("Key", bound=Hashable)


class Scheduler(Generic[Key]):
    """The policies of the models on a device, by what their owner calls these. Pure, like the policies."""

    def __init__(self) -> None:
        self.policies: dict[Key, Policy] = {}

    def waiting(self) -> int:
        """How many rows wait, of all models."""
        return sum(policy.waiting() for policy in self.policies.values())

    def wake_s(self) -> float:
        """When to ask again even though nothing happens; infinity for never."""
        return min((policy.wake_s() for policy in self.policies.values()), default=math.inf)

    def decide(self, now_s: float, *, crowded: bool = False) -> tuple[list[Decision], Key | None, Batch | None]:
        """What to do now that the device is free: the decisions of all policies, and the one batch among them, with its
        model. `crowded`: see `Policy.decide`.

        The models are asked in the order of the time that their rows can spare, each leaving the next ones theirs.
        """
        if len(self.policies) == 1:
            ((key, policy),) = self.policies.items()
            decision = policy.decide(now_s, crowded=crowded)
            return [decision], key, decision.batch
        spare_s = {key: policy.spare_s(now_s) for key, policy in self.policies.items()}
        order = sorted(self.policies, key=spare_s.__getitem__)
        decisions: list[Decision] = []
        for place, key in enumerate(order):
            others_s = min((spare_s[other] for other in order if other != key), default=math.inf)
            decision = self.policies[key].decide(now_s, others_s, crowded=crowded)
            decisions.append(decision)
            spare_s[key] = self.policies[key].spare_s(now_s)  # of the rows that are left
            if decision.batch is not None:
                until_s = now_s + decision.batch.expected_s
                decisions.extend(self.policies[other].settle(now_s, until_s) for other in order[place + 1 :])
                return decisions, key, decision.batch
        return decisions, None, None
