"""One connection: read a request, look it up, write the reply. Here the protocol, the process model and maps meet.

Every row of the reply table is in this file: what a lookup may return or raise, what a client may send, and what the
client gets for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic

from prefork_socketmap.config import Config
from prefork_socketmap.prefork.connection import Connection, Ending
from prefork_socketmap.prefork.job import Job
from prefork_socketmap.prefork.tallies import Tallies, Tally
from prefork_socketmap.prefork.worker import Overdue
from prefork_socketmap.socketmap import netstring
from prefork_socketmap.socketmap.messages import (
    InvalidReplyError,
    MalformedRequestError,
    Reply,
    ReplyTooLargeError,
    Status,
    encode_reply,
    split_request,
)

Answer = Reply | str | None
"""What a lookup returns: a str is the value of an OK, None means not found."""
Lookup = Callable[[str], Answer]
DefaultLookup = Callable[[str, str], Answer]

log = logging.getLogger("prefork_socketmap.worker")
lookups = logging.getLogger("prefork_socketmap.worker.lookups")

COLUMNS = tuple(Status)
"""What the columns of a map's tally count."""
_COLUMN = {status.prefix: index for index, status in enumerate(COLUMNS)}  # the hash of an Enum's member is slow
ANY_OTHER_MAP = "(default)"
NO_SUCH_MAP = "(unknown)"

_OK = Status.OK  # Enum looks its members up in a slow way
_NOT_FOUND = Reply.not_found()
_MALFORMED = Reply.perm_fail("malformed request")
_NO_SUCH_MAP = Reply.temp_fail("the lookup map does not exist")
_FAILED = Reply.temp_fail("lookup failed")
_TIMED_OUT = Reply.timeout("lookup timed out")
_TOO_LARGE = Reply.temp_fail("reply too large")
_INVALID = Reply.temp_fail("invalid reply")


class Service:
    """Answers lookups from *maps*, by name, and from *default* for any other name.

    ``service(connection)`` serves one connection and returns when it has ended or has to be let go of. Each lookup is
    counted in its map's tally (see ``tally_names``); with *log_lookups* it is logged on a line of its own, too.
    """

    def __init__(
        self,
        maps: Mapping[str, Lookup],
        default: DefaultLookup | None,
        config: Config,
        tallies: Tallies,
        *,
        log_lookups: bool = False,
    ) -> None:
        self._maps = {name: (lookup, tallies[name]) for name, lookup in maps.items()}
        self._others = default or _no_such_map, tallies[name_of_others(default is not None)]
        self._max_request_size = config.max_request_size
        self._max_reply_size = config.max_reply_size
        self._read_timeout = config.read_timeout or float("inf")
        self._write_timeout = config.write_timeout
        self._log_lookups = log_lookups

    def __call__(self, connection: Connection) -> None:
        """Answer the requests on *connection*, in order, until it ends."""
        decoder = netstring.Decoder(self._max_request_size)
        deadline = None
        while True:  # not "while data": CPython 3.11 does not optimize a function for a loop with a condition
            data = connection.receive_until(deadline) if deadline else connection.await_request()
            if not data:
                return
            decoder.feed(data)
            while decoder.pending:
                try:
                    payload = decoder.next()
                except netstring.FramingError as error:
                    self._refuse(connection, error)
                    return
                if payload is None:
                    deadline = deadline or monotonic() + self._read_timeout
                    break
                deadline = None
                if not connection.send(netstring.encode(self._answer(payload, connection)), self._write_timeout):
                    return

    def _refuse(self, connection: Connection, error: netstring.FramingError) -> None:
        log.warning("%s: malformed request: %s", connection.client, error)
        if connection.send(netstring.encode(_MALFORMED.encode()), self._write_timeout):
            connection.ending = Ending.REFUSED

    def _answer(self, payload: bytes, connection: Connection) -> bytes:
        """Return the payload of the reply to a request's payload."""
        try:
            name, key = split_request(payload)
        except MalformedRequestError as error:
            log.warning("%s: malformed request: %s", connection.client, error)
            return _MALFORMED.encode()
        lookup, tally = self._maps.get(name) or self._default(name)
        job = connection.job
        answer = self._look_up(name, key, lookup, tally, job)
        status, reply = self._encode(name, key, answer)
        tally.count(_COLUMN[status.prefix], job.seconds)
        if self._log_lookups:
            # What the client wrote stands last, and in brackets as in Postfix's log: a key may hold ", status=OK".
            lookups.info(
                "lookup: client=%s, status=%s, time=%.1f ms, map=%s, key=<%s>",
                connection.client,
                status.value,
                job.seconds * 1000,
                name,
                key,
            )
        return reply

    def _encode(self, name: str, key: str, answer: Answer) -> tuple[Status, bytes]:
        """Return status and payload of the reply for *answer*, or for the error that it is."""
        try:
            if isinstance(answer, str):
                status, text = _OK, answer  # as a Reply it would take as long again as all that is left to do
            elif answer is None:
                status, text = _NOT_FOUND
            elif isinstance(answer, Reply):
                status, text = answer
            else:
                raise InvalidReplyError(f"{type(answer).__name__}; return a str, a Reply, or None for 'not found'")
            return status, encode_reply(status, text, self._max_reply_size)
        except ReplyTooLargeError as error:
            log.error("map %r, key %r: %s", name, key, error)
            reply = _TOO_LARGE
        except InvalidReplyError as error:
            log.error("map %r, key %r: the map returned %s", name, key, error)
            reply = _INVALID
        return reply.status, reply.encode()

    def _default(self, name: str) -> tuple[Lookup, Tally]:
        lookup, tally = self._others
        return partial(lookup, name), tally

    def _look_up(self, name: str, key: str, lookup: Lookup, tally: Tally, job: Job) -> Answer:
        """Return what *lookup* says to *key*; whatever goes wrong in it becomes a reply."""
        try:
            try:
                job.begin(tally.index)
                return lookup(key)
            finally:
                job.end()
        except (TimeoutError, Overdue):
            job.end()  # again: the interruption may have hit right before the first time
            log.warning("map %r, key %r: lookup timed out", name, key)
            return _TIMED_OUT
        except BaseException:  # a SystemExit, too, is the lookup's failure, and no reason for the worker to go
            log.exception("map %r, key %r: lookup failed", name, key)
            return _FAILED


def _no_such_map(_name: str, _key: str) -> Reply:
    return _NO_SUCH_MAP


def tally_names(maps: Iterable[str], *, has_default: bool) -> list[str]:
    """Return the names that a service needs tallies for: its maps', and one for all other names."""
    return [*maps, name_of_others(has_default)]


def name_of_others(has_default: bool) -> str:
    """Return the name under which lookups in a map of any other name are counted."""
    return ANY_OTHER_MAP if has_default else NO_SUCH_MAP
