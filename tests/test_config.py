"""Config: the documented defaults, and a wrong value is an error at construction that names the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prefork_socketmap.config import Config
from prefork_socketmap.settings import SettingError

# The manual's table. A default that changes is a change for every user: it has to be made here as well.
DEFAULTS = {
    "port": 27823,
    "read_timeout": 100.0,
    "write_timeout": 100.0,
    "idle_timeout": 10.0,
    "lookup_timeout": 30.0,
    "max_request_size": 100_000,
    "max_reply_size": 100_000,
    "process_limit": 100,
    "min_spare": 5,
    "max_use": 0,
    "max_idle": 100.0,
    "max_connections": 0,
    "keepalive_timeout": 3600.0,
    "stop_timeout": 30.0,
    "backlog": 4096,
}
FIELDS = [field.name for field in dataclasses.fields(Config)]
TIMES = [name for name in FIELDS if isinstance(DEFAULTS.get(name), float)]
COUNTS = [name for name in FIELDS if isinstance(DEFAULTS.get(name), int)]


def config_with(name: str, value: Any) -> Config:
    """Return a Config with one field set, as a file sets it: to a value of any type."""
    return Config(**{name: value})


def test_the_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Config()) == DEFAULTS


@pytest.mark.parametrize("name", TIMES)
def test_a_time_takes_seconds_or_a_postfix_time_value(name: str) -> None:
    assert getattr(config_with(name, 7), name) == 7.0
    assert getattr(config_with(name, "2m"), name) == 120.0
    assert getattr(config_with(name, 0), name) == 0.0


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [-1, "soon", None, True])
def test_a_wrong_time_names_the_field_and_what_is_accepted(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{name}: {value!r} is not accepted here; expected a number of seconds"):
        config_with(name, value)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True])
def test_a_wrong_count_names_the_field_and_what_is_accepted(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{name}: {value!r} is not accepted here; expected a whole number"):
        config_with(name, value)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("port", 1, 65535),
        ("process_limit", 1, 10000),
        ("min_spare", 1, 10000),
        ("backlog", 1, 65535),
        ("max_request_size", 1, None),
        ("max_reply_size", 0, None),
        ("max_use", 0, None),
        ("max_connections", 0, None),
    ],
)
def test_a_count_is_taken_within_its_bounds_and_not_beyond(name: str, least: int, most: int | None) -> None:
    assert getattr(config_with(name, least), name) == least
    with pytest.raises(SettingError, match=f"at least {least}"):
        config_with(name, least - 1)
    if most is not None:
        assert getattr(config_with(name, most), name) == most
        with pytest.raises(SettingError, match=f"at most {most}"):
            config_with(name, most + 1)


def test_a_wrong_value_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="read_timeout"):
        Config(read_timeout=-1)


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="read_time"):
        Config(read_time=1)  # type: ignore[call-arg]


def test_a_config_is_not_changed_after_it_was_checked() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 0  # type: ignore[misc]


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(SettingError, match=r"^port: "):
        dataclasses.replace(Config(), port=0)
