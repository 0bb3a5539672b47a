"""How a map type declares the keys of its configuration table, and how a table is read by the declaration.

A type lists its keys as class attributes::

    class PhoneBook(Map):
        path = setting(settings.text)           # required
        country = setting(settings.text, "de")  # has a default

and finds the checked values in the attributes of the same names. What values look like, and the errors, is the
business of ``prefork_socketmap.settings``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, overload

from prefork_socketmap import settings

T = TypeVar("T")
D = TypeVar("D")

_REQUIRED: Any = object()


class Setting(Generic[T]):
    """One key of a map's table. Declare it with ``setting``."""

    def __init__(self, read: Callable[[str, object], T], default: T) -> None:
        self._read = read
        self._default = default

    # Without __set__ the value in the instance's dictionary comes first: reading a setting costs what reading any
    # attribute costs.
    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object, owner: type) -> Setting[T] | T:
        return self if instance is None else self._default

    def value(self, prefix: str, key: str, table: Mapping[str, object]) -> T:
        """Return the value for *key* in *table*, checked, or the default."""
        if key in table:
            return self._read(prefix + key, table[key])
        if self._default is _REQUIRED:
            raise settings.SettingError(prefix + key, "is missing")
        return self._default


@overload
def setting(read: Callable[[str, object], T]) -> Setting[T]: ...
@overload
def setting(read: Callable[[str, object], T], default: D) -> Setting[T | D]: ...
def setting(read: Callable[[str, object], Any], default: Any = _REQUIRED) -> Setting[Any]:
    """Declare a key: *read* checks the value that stands there (see ``settings``), *default* is used as it is."""
    return Setting(read, default)


class _Removed(Setting[T]):
    """A key of a base class that the type has not: the value is always the same."""


def removed(value: T) -> Setting[T]:
    """Declare that a type has not the key of its base class, for which *value* stands."""
    return _Removed(lambda _key, _found: value, value)


def declared(owner: type) -> Iterator[tuple[str, Setting[Any]]]:
    """Iterate over the settings of a class and its bases, as (key, setting)."""
    for key in dir(owner):
        value = getattr(owner, key)
        if isinstance(value, Setting) and not isinstance(value, _Removed):
            yield key, value


def read_table(owner: type, prefix: str, table: Mapping[str, object]) -> dict[str, Any]:
    """Return a value for every setting of *owner*, from *table* or its default.

    Raises SettingError, its key beginning with *prefix*, for an unknown, a wrong or a missing key.
    """
    known = dict(declared(owner))
    settings.reject_unknown(prefix, table.keys(), known.keys())
    return {key: declaration.value(prefix, key, table) for key, declaration in known.items()}
