"""What the master and its workers share, made before the first fork: the scoreboard, the lot, the ways to talk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from prefork_socketmap.prefork.channel import Channel
from prefork_socketmap.prefork.parking import Lot
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.prefork.takeover import State


@dataclass
class Shared:
    """The scoreboard, the lot, both ends of the inbox, and both of the lifeline.

    The master alone holds the end ``held``: ``lifeline`` becomes readable when it is gone, however that happened.
    """

    board: Scoreboard
    lot: Lot
    inbox: Channel
    workers_inbox: Channel
    lifeline: int
    held: int

    @classmethod
    def new(cls, limit: int, board: Scoreboard) -> Self:
        """Make it all, for processes of at most *limit* descriptors."""
        inbox, workers_inbox = Channel.pair()
        lifeline, held = os.pipe()
        lot = Lot(limit)
        lot.watch_master(lifeline)
        return cls(board, lot, inbox.not_blocking(), workers_inbox, lifeline, held)

    @classmethod
    def resume(cls, state: State, board: Scoreboard) -> Self:
        """Go on with what the program that was here before has made."""
        inbox, workers_inbox = map(Channel.resume, state.inbox)
        return cls(board, Lot.resume(state.lot), inbox.not_blocking(), workers_inbox, *state.lifeline)

    def leave_to_child(self) -> None:
        """In a new worker: close what is the master's alone."""
        self.inbox.close()
        os.close(self.held)

    def close(self) -> None:
        """Close everything."""
        self.board.close()
        self.lot.close()
        self.inbox.close()
        self.workers_inbox.close()
        os.close(self.lifeline)
        os.close(self.held)
