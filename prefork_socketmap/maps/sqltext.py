r"""Where the expansions of a query template stand in the language of a database, and the statement that binds them.

A server and its client have to agree on where a literal ends. So each dialect has a table of its lexical forms, after
the documentation of the database: "SQL As Understood By SQLite"; "SQL Syntax", 4.1, of PostgreSQL; "String Literals",
"Schema Object Names" and "Comment Syntax" of MySQL and MariaDB. Nothing but the forms is known here, no grammar.

A literal with expansions becomes one parameter, whose value is what the database would make of the literal:
``'it''s %u'`` with ``user`` is the text ``it's user``. Where that is not certain the query is refused. No key is ever
part of a statement, so if a table were wrong, a lookup would fail or find something else, but run no other statement.

Pure: knows no driver and asks nobody.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from prefork_socketmap import settings
from prefork_socketmap.maps.template import Address, Template

# An expansion while a text is taken apart: this and its letter. No statement can have the character.
_MARK = "\0"
# For an error message: a form's beginning and end, and what is between them, expansions apart from the rest.
_BEGINNING = re.compile(r"(?:[a-z]&?|@)?['\"`]|/\*M?!?|values|[@:?$]\d*|\[", re.IGNORECASE)
_ENDS = frozenset("'\"`]")
_INSIDE = re.compile(f"{_MARK}(.)|[^{_MARK}]+", re.DOTALL)
# Next to these, a placeholder needs no space.
_SEPARATORS = frozenset(" \t\n\r\f(),;=<>")


class Kind(enum.Enum):
    """What a form is, as far as it matters here."""

    SPACE = "space"
    COMMENT = "a comment"
    LITERAL = "a literal of this form"
    NAME = "a quoted name; text stands in single quotes"
    WORD = "word"
    EXPANSION = "expansion"
    """One that stands by itself."""
    PARAMETER = "a parameter of its own"
    CONDITIONAL = "a conditional comment with quotes, a comment or a part of the key in it"
    ROWS = "a list of rows, in which MariaDB does not find what is bound,"
    OPEN = "a literal, a quoted name or a comment without an end"
    OTHER = "other"


class Form(NamedTuple):
    """A lexical form: what it is, and what it looks like."""

    kind: Kind
    pattern: str
    decode: Callable[[str], str] | None = None
    """Of a literal: returns what a piece of the text between its quotes stands for. None: an expansion in it is
    refused."""


@dataclass(frozen=True)
class Dialect:
    """The language of a server."""

    forms: tuple[Form, ...]
    placeholder: str
    """``$`` gets a number."""
    types: str = "(?!)"
    """Pattern of the names after which a literal is one of that type."""
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        alternatives = (f"(?P<f{number}>{form.pattern})" for number, form in enumerate(self.forms))
        object.__setattr__(self, "_pattern", re.compile("|".join(alternatives), re.DOTALL))

    def lexemes(self, text: str) -> Iterator[tuple[Form, str]]:
        """Split *text*, with its expansions marked, into lexemes. Raises ValueError."""
        end = 0
        while end < len(text):
            match = self._pattern.match(text, end)
            if match is None:
                part, around = _written(text[end : end + 2]), settings.shown(_written(_around(text, end)))
                raise ValueError(f"the part {part} of the key in {around} does not stand by itself")
            # The group of the form is the last one that closes.
            yield self.forms[int((match.lastgroup or "")[1:])], match[0]
            end = match.end()


@dataclass(frozen=True)
class Statement:
    """A statement with placeholders, and what is bound to them."""

    text: str
    parameters: tuple[Template, ...]

    def values(self, key: str) -> list[str]:
        """Return the parameters for *key*, which has the parts that the query needs."""
        address = Address.split(key)
        return [parameter.expand(address) for parameter in self.parameters]


def bind(query: Template, dialect: Dialect) -> Statement:
    """Return the statement for *query*. Raises ValueError when an expansion cannot be bound where it stands."""
    text = "".join(_MARK + piece if number % 2 else piece for number, piece in enumerate(query.pieces))
    if text.count(_MARK) > len(query.pieces) // 2:
        raise ValueError("a query cannot have a NUL")
    writer = _Writer(dialect)
    for form, lexeme in dialect.lexemes(text):
        writer.add(form, lexeme)
    return Statement("".join(writer.texts), tuple(writer.parameters))


class _Writer:
    """Writes a statement, lexeme by lexeme."""

    def __init__(self, dialect: Dialect) -> None:
        self.texts: list[str] = []
        self.parameters: list[Template] = []
        self._dialect = dialect
        # Places in ``texts`` of the last two lexemes that are neither space nor comment, and what the last one is.
        self._places = (-1, -1)
        self._kind = Kind.OTHER
        self._is_bound = False
        self._ends_with_placeholder = False

    def add(self, form: Form, lexeme: str) -> None:
        kind = form.kind
        if kind in (Kind.PARAMETER, Kind.CONDITIONAL, Kind.ROWS, Kind.OPEN):
            raise ValueError(f"{_shown(lexeme)}: {kind.value} cannot be in a query")
        if kind in (Kind.SPACE, Kind.COMMENT):
            self._write(" " if _MARK in lexeme else lexeme)
            return
        is_bound = _MARK in lexeme
        self._refuse_neighbours(kind, lexeme, is_bound)
        if is_bound:
            self._write(self._parameter(_value(form, lexeme)), is_placeholder=True)
        else:
            self._write(lexeme)
        self._kind, self._is_bound = kind, is_bound
        self._places = (self._places[1], len(self.texts) - 1)

    def _write(self, text: str, is_placeholder: bool = False) -> None:
        last = self.texts[-1] if self.texts else " "
        # "LIKE'%s'" is right, and LIKE$1 another word.
        if (is_placeholder or self._ends_with_placeholder) and not {last[-1], text[0]} & _SEPARATORS:
            self.texts.append(" ")
        self.texts.append(text)
        self._ends_with_placeholder = is_placeholder

    def _refuse_neighbours(self, kind: Kind, lexeme: str, is_bound: bool) -> None:
        values = (Kind.LITERAL, Kind.EXPANSION)
        if kind in values and self._kind in values and (is_bound or self._is_bound):
            raise ValueError(
                f"{_shown(lexeme)}: next to another literal, a literal with a part of the key cannot be bound"
            )

    def _parameter(self, value: Template) -> str:
        self.parameters.append(value)
        number = str(len(self.parameters)) if self._dialect.placeholder == "$" else ""
        placeholder = self._dialect.placeholder + number
        before, last = self._places
        word = self.texts[last] if self._kind is Kind.WORD else ""
        if not re.fullmatch(self._dialect.types, word, re.IGNORECASE) or (before >= 0 and self.texts[before] == "."):
            return placeholder
        self.texts[last] = "CAST("
        return f"{placeholder} AS {word})"


def _value(form: Form, lexeme: str) -> Template:
    """Return what is bound for *lexeme*, which has expansions."""
    if form.kind is Kind.EXPANSION:
        return Template("%" + lexeme[1:])
    if form.decode is None:
        raise ValueError(f"{_shown(lexeme)}: a part of the key cannot be in {form.kind.value}")
    _, opening, rest = re.split(r"^(\$[^$]*\$|\w*['\"])", lexeme, maxsplit=1)
    body = rest.removesuffix(opening if opening.startswith("$") else opening[-1])
    pieces = re.split(f"{_MARK}(.)", body)
    try:
        pieces[::2] = [form.decode(piece).replace("%", "%%") for piece in pieces[::2]]
    except ValueError as error:
        raise ValueError(f"{_shown(lexeme)}: {error}") from error
    pieces[1::2] = ["%" + letter for letter in pieces[1::2]]
    return Template("".join(pieces))


def _written(text: str) -> str:
    return text.replace("%", "%%").replace(_MARK, "%")


def _shown(lexeme: str) -> str:
    """Return of *lexeme* what cannot be a secret: how it begins and ends, and its parts of the key."""
    begin = match[0] if (match := _BEGINNING.match(lexeme)) else ""
    end = lexeme[-1] if len(lexeme) > len(begin) and lexeme[-1] in _ENDS else ""
    inside = lexeme[len(begin) : len(lexeme) - len(end)]
    return begin + _INSIDE.sub(lambda match: f"%{match[1]}" if match[1] else "...", inside) + end


def _around(text: str, place: int) -> str:
    begin = max(text.rfind(" ", 0, place) + 1, place - 20)
    return text[begin : place + 20].partition(" ")[0]


def _verbatim(text: str) -> str:
    return text


def _decoder(quote: str, escapes: Mapping[str, str] | None = None, refused: str = "") -> Callable[[str], str]:
    """Return what undoes doubled quotes and, with *escapes*, backslashes.

    *escapes* says what a letter behind a backslash stands for; any other but those *refused* is itself.
    """
    pattern = re.compile(quote * 2 if escapes is None else rf"{quote * 2}|\\(.?)", re.DOTALL)

    def undo(match: re.Match[str]) -> str:
        if match[0] == quote * 2:
            return quote
        letter = match[1]
        if not letter:
            raise ValueError("a backslash cannot quote what comes from the key")
        if letter in refused:
            raise ValueError(f"\\{letter} and a part of the key cannot be in one literal")
        return (escapes or {}).get(letter, letter)

    return partial(pattern.sub, undo)


# No quantifier of a group here is possessive: Python until 3.11.4 loses its way in those (its issue 106052). Whatever
# follows a group cannot stand in it, so that there is one way only to match, and none to try again.


def _quoted(quote: str) -> str:
    """Return the pattern of what stands in quotes, and has them in it doubled."""
    return f"{quote}[^{quote}]*(?:{quote}{quote}[^{quote}]*)*{quote}(?!{quote})"


def _backslashed(quote: str) -> str:
    """Return the pattern of the same, where a backslash quotes any character."""
    return rf"{quote}[^{quote}\\]*(?:(?:\\.|{quote}{quote})[^{quote}\\]*)*{quote}(?!{quote})"


def _nested(depth: int) -> str:
    """Return the pattern of comments with comments in them."""
    deeper = f"|{_nested(depth - 1)}" if depth else ""
    return rf"/\*(?:[^*/]|\*(?!/)|/(?!\*){deeper})*\*/"


_SPACE = Form(Kind.SPACE, r"[ \t\n\r\f\v]+")
_LETTER = r"(?:[^\W\d]|[^\x00-\x7f])"
_LETTERS = r"[\w\x80-\U0010ffff]*"
_IN_WORD = r"[\w$\x80-\U0010ffff]"
# Beginning with a digit it ends at a dollar sign: 1$$ is a number and a quote.
_WORD = Form(Kind.WORD, rf"{_LETTER}{_IN_WORD}*|\d{_LETTERS}")
_EXPANSION = Form(Kind.EXPANSION, rf"(?<![\w$.@:#])(?<![^\x00-\x7f]){_MARK}.(?![\w$.@\x00]|[^\x00-\x7f])")
_OTHER = Form(Kind.OTHER, f"[^{_MARK}]")
_SINGLE = Form(Kind.LITERAL, _quoted("'"), _decoder("'"))
_NAME = Form(Kind.NAME, _quoted('"'))
_BACKTICKS = Form(Kind.NAME, _quoted("`"))
_PLAIN_COMMENT = r"/\*.*?\*/"

SQLITE = Dialect(
    (
        _SPACE,
        Form(Kind.COMMENT, rf"--[^\n]*|{_PLAIN_COMMENT}"),
        Form(Kind.LITERAL, f"[xX]{_quoted(chr(39))}"),
        _SINGLE,
        _NAME,
        _BACKTICKS,
        Form(Kind.NAME, r"\[[^]]*\]"),
        Form(Kind.PARAMETER, rf"\?\d*|[@#:$]{_IN_WORD}+"),
        Form(Kind.OPEN, r"['\"`\[]|/\*"),
        _EXPANSION,
        _WORD,
        _OTHER,
    ),
    "?",
)


# Not interval, which can have a field behind the literal, nor char, which is another type in a cast.
_TYPES = (
    "text|varchar|bpchar|name|citext|bool(ean)?|(small|big)?int|integer|int[248]|numeric|decimal|real|float[48]"
    "|date|time(stamp)?(tz)?|inet|cidr|macaddr|uuid|bytea|jsonb?|jsonpath|xml|ltree"
)


def _postgresql(plain: Form) -> Dialect:
    """Return PostgreSQL's dialect, where *plain* is a literal without a prefix."""
    escapes = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
    c_style = _decoder("'", escapes, "01234567xuU")
    return Dialect(
        (
            _SPACE,
            Form(Kind.COMMENT, rf"--[^\r\n]*|{_nested(3)}"),
            Form(Kind.LITERAL, f"[eE]{_backslashed(chr(39))}", c_style),
            Form(Kind.LITERAL, f"(?:[uU]&|[bBxX]){_quoted(chr(39))}"),
            # N'' is the word N and a plain one.
            plain if plain.decode else plain._replace(decode=c_style),
            Form(Kind.LITERAL, rf"\$(?P<tag>(?:{_LETTER}{_LETTERS})?)\$.*?\$(?P=tag)\$", _verbatim),
            Form(Kind.NAME, f"(?:[uU]&)?{_quoted(chr(34))}"),
            Form(Kind.PARAMETER, r"\$\d+"),
            Form(Kind.OPEN, rf"['\"]|/\*|\$(?:{_LETTER}{_LETTERS})?\$"),
            _EXPANSION,
            _WORD,
            _OTHER,
        ),
        "$",
        _TYPES,
    )


POSTGRESQL = _postgresql(_SINGLE)
POSTGRESQL_WITH_BACKSLASHES = _postgresql(Form(Kind.LITERAL, _backslashed("'")))
"""With ``standard_conforming_strings`` off."""


def _mysql(ansi_quotes: bool, backslashes: bool) -> Dialect:
    escapes = {"0": "\0", "b": "\b", "n": "\n", "r": "\r", "t": "\t", "Z": "\x1a", "%": r"\%", "_": r"\_"}

    def literal(quote: str) -> Form:
        if backslashes:
            return Form(Kind.LITERAL, _backslashed(quote), _decoder(quote, escapes))
        return Form(Kind.LITERAL, _quoted(quote), _decoder(quote))

    single = literal("'")
    double = _NAME if ansi_quotes else literal('"')
    return Dialect(
        (
            _SPACE,
            # In a conditional comment, where nothing is quoted, both readings of it end at the same place.
            Form(Kind.COMMENT, r"/\*M?!(?:(?!\*/|/\*|--)[^'\"`#\x00])*\*/"),
            Form(Kind.CONDITIONAL, r"/\*M?!"),
            Form(Kind.COMMENT, rf"#[^\n]*|--(?=[\x01-\x20\x7f]|\Z)[^\n]*|{_PLAIN_COMMENT}"),
            # The name of a variable.
            Form(Kind.NAME, f"@(?:{single.pattern}|{double.pattern}|{_BACKTICKS.pattern})"),
            single,
            double,
            _BACKTICKS,
            Form(Kind.PARAMETER, r"\?"),
            Form(Kind.ROWS, rf"(?<!\.)(?i:values)(?!{_IN_WORD})"),
            Form(Kind.OPEN, r"['\"`]|/\*"),
            _EXPANSION,
            _WORD,
            _OTHER,
        ),
        "?",
    )


MYSQL = {
    (ansi_quotes, backslashes): _mysql(ansi_quotes, backslashes)
    for ansi_quotes in (False, True)
    for backslashes in (True, False)
}
"""By whether the modes have ``ANSI_QUOTES``, and whether they have no ``NO_BACKSLASH_ESCAPES``."""
