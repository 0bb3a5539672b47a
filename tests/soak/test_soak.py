"""A short soak: nothing is lost, and nothing is left behind."""

from __future__ import annotations

from tests.soak.campaign import Campaign

SECONDS = 15.0


def test_nothing_is_lost_while_workers_and_backends_die_and_programs_are_replaced() -> None:
    with Campaign(seed=11) as campaign:
        result = campaign.run(SECONDS)
        print(result, campaign.logs(), sep="\n")
    assert result.problems() == []
    assert result.mails > 0
    assert min(result.done.values()) > 0, "not everything that can happen has happened"
