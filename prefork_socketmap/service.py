"""One connection: read a request, look it up, write the reply. Here the protocol, the process model and maps meet.

Every row of the reply table is in this file: what a lookup may return or raise, what a client may send, and what the
client gets for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prefork_socketmap.config import Config
from prefork_socketmap.prefork.connection import Connection
from prefork_socketmap.prefork.counters import JobCounters, SlotCounters
from prefork_socketmap.prefork.worker import Overdue
from prefork_socketmap.socketmap import netstring
from prefork_socketmap.socketmap.messages import (
    InvalidReplyError,
    MalformedRequestError,
    Reply,
    ReplyTooLargeError,
    Status,
    encode_reply,
    printable,
    split_request,
)

Answer = Reply | str | None
"""What a lookup returns: a str is the value of an OK, None means not found."""
Lookup = Callable[[str], Answer]
DefaultLookup = Callable[[str, str], Answer]

log = logging.getLogger("prefork_socketmap.worker")
lookups = logging.getLogger("prefork_socketmap.worker.lookups")

ENDINGS = tuple(Status)
"""The ways for a lookup to end, as a map's counters have them."""
_ENDING = {status.prefix: index for index, status in enumerate(ENDINGS)}  # the hash of an Enum's member is slow
ANY_OTHER_MAP = "(default)"
NO_SUCH_MAP = "(unknown)"

_MOST_UNKNOWN = 20  # names that are told of by themselves; the others together

_OK = Status.OK  # Enum looks its members up in a slow way
_NOT_FOUND = Reply.not_found()
_MALFORMED = Reply.perm_fail("malformed request").encode()
_NO_SUCH_MAP = Reply.temp_fail("the lookup map does not exist")
_FAILED = Reply.temp_fail("lookup failed")
_TIMED_OUT = Reply.timeout("lookup timed out")
_TOO_LARGE = Reply.temp_fail("reply too large")
_INVALID = Reply.temp_fail("invalid reply")


class Service:
    """Answers lookups from *maps*, by name, and from *default* for any other name.

    ``service(connection)`` serves one turn of a connection. Each lookup is counted in its map's counters (see
    ``counter_names``); with *log_lookups* it is logged on a line of its own, too.
    """

    def __init__(
        self,
        maps: Mapping[str, Lookup],
        default: DefaultLookup | None,
        config: Config,
        counters: SlotCounters,
        *,
        log_lookups: bool = False,
    ) -> None:
        self._maps = {name: (lookup, counters[name]) for name, lookup in maps.items()}
        self._others = default or self._no_such_map, counters[name_of_others(default is not None)]
        self._unknown: set[str] = set()
        self._split = netstring.Splitter(config.max_request_size).split
        self._max_reply_size = config.max_reply_size
        self._log_lookups = log_lookups

    def __call__(self, connection: Connection) -> None:
        """Answer the requests that have arrived, in order, as many as one turn has room for; keep the rest."""
        data = connection.receive()
        begin = 0
        while True:  # not "while data": CPython 3.11 does not optimize a function for a loop with a condition
            if begin == len(data):
                return
            try:
                payload, end = self._split(data, begin)
            except netstring.FramingError as error:
                log.warning("[%s]: malformed request: %s", connection.client, error)
                connection.refuse(netstring.encode(_MALFORMED))
                return
            if payload is None:
                data, begin = data[begin:], 0
                rest = connection.receive_rest(end)
                if not rest:
                    connection.keep_rest(data, end)
                    return
                data += rest
                continue
            begin = end
            sent = connection.send(netstring.encode(self._answer(payload, connection)))
            if begin < len(data) and not (sent and connection.may_go_on()):
                connection.keep_turn(data[begin:])
                return

    def _answer(self, payload: bytes, connection: Connection) -> bytes:
        """Return the payload of the reply to a request's payload."""
        try:
            name, key = split_request(payload)
        except MalformedRequestError as error:
            log.warning("[%s]: malformed request: %s", connection.client, error)
            return _MALFORMED
        lookup, counters = self._maps.get(name) or self._default(name)
        job = connection.job
        try:
            try:
                job.begin(counters)
                answer = lookup(key)
            finally:
                job.end()
        except BaseException as error:  # noqa: BLE001 - a SystemExit, too, is the lookup's failure
            job.end()  # again: an interruption may have hit right before the first time
            answer = self._failure(name, key, error)
        status, reply = self._encode(name, key, answer)
        counters.count(_ENDING[status.prefix], job.seconds)
        if self._log_lookups:
            # What the client wrote stands last, and in brackets as in Postfix's log: a key may hold ", status=OK".
            lookups.info(
                "lookup: client=%s, status=%s, time=%.1f ms, map=<%s>, key=<%s>",
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
            log.error("map <%s>, key <%s>: %s", printable(name), printable(key), error, extra=self._about(name))
            reply = _TOO_LARGE
        except InvalidReplyError as error:
            text = "map <%s>, key <%s>: the map returned %s"
            log.error(text, printable(name), printable(key), error, extra=self._about(name))
            reply = _INVALID
        return reply.status, reply.encode()

    def _default(self, name: str) -> tuple[Lookup, JobCounters]:
        lookup, counters = self._others
        return partial(lookup, name), counters

    def _no_such_map(self, name: str, _key: str) -> Reply:
        """Tell of a name that is no map's, in the log and for ``status``. Clients make up any number of them."""
        if name not in self._unknown and len(self._unknown) < _MOST_UNKNOWN:
            self._unknown.add(name)
        about = name if name in self._unknown else NO_SUCH_MAP
        log.warning("there is no map <%s>, and no default map: TEMP", printable(name), extra={"map": about})
        self._others[1].note = name
        return _NO_SUCH_MAP

    def _failure(self, name: str, key: str, error: BaseException) -> Reply:
        """Return the reply to a lookup that has raised *error*; the log tells more than the client."""
        if isinstance(error, TimeoutError | Overdue):
            text = "map <%s>, key <%s>: lookup timed out"
            log.warning(text, printable(name), printable(key), extra=self._about(name))
            return _TIMED_OUT
        text = "map <%s>, key <%s>: lookup failed"
        log.error(text, printable(name), printable(key), exc_info=error, extra=self._about(name))
        return _FAILED

    def _about(self, name: str) -> Mapping[str, str]:
        """Return what a line of the log is about, for who counts those that repeat: clients make up other names."""
        return {"map": name if name in self._maps else ANY_OTHER_MAP}


def counter_names(maps: Iterable[str], *, has_default: bool) -> list[str]:
    """Return the names that a service needs counters for: its maps', and one for all other names."""
    return [*maps, name_of_others(has_default)]


def name_of_others(has_default: bool) -> str:
    """Return the name under which lookups in a map of any other name are counted."""
    return ANY_OTHER_MAP if has_default else NO_SUCH_MAP
