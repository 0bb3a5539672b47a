"""Index files."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.maps.index import TAG_SIZE, DamagedError, Index, write
from tests.maps.doubles import damaged

TAG = bytes(range(TAG_SIZE))
keys = st.binary().filter(lambda key: b"\0" not in key)
values = st.binary().filter(lambda value: b"\n" not in value)


def make(path: Path, entries: list[tuple[bytes, bytes]]) -> Index:
    with path.open("wb") as file:
        assert write(file, entries, TAG) == len(entries)
    return opened(path)


def opened(path: Path) -> Index:
    return Index(os.open(path, os.O_RDONLY))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index") / "index"


@given(table=st.dictionaries(keys, values), other=keys)
def test_what_was_written_is_found_and_nothing_else(path: Path, table: dict[bytes, bytes], other: bytes) -> None:
    index = make(path, list(table.items()))
    assert {key: index.get(key) for key in table} == table
    assert len(index) == len(table)
    if other not in table:
        assert index.get(other) is None
    assert index.tag == TAG
    index.close()


def test_of_the_same_key_twice_the_first_counts(path: Path) -> None:
    assert make(path, [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]).get(b"a") == b"1"


def test_keys_with_the_same_checksum_are_told_apart(path: Path) -> None:
    assert crc32(b"plumless") == crc32(b"buckeroo")
    index = make(path, [(b"plumless", b"1"), (b"buckeroo", b"2")])
    assert (index.get(b"plumless"), index.get(b"buckeroo")) == (b"1", b"2")
    assert make(path, [(b"plumless", b"1")]).get(b"buckeroo") is None


def test_a_key_is_not_found_by_its_beginning(path: Path) -> None:
    index = make(path, [(b"abc", b"1")])
    assert index.get(b"ab") is None
    assert index.get(b"abcd") is None


def test_many_keys_are_found_in_a_large_table(path: Path) -> None:
    index = make(path, [(b"key%d" % number, b"%d" % number) for number in range(5000)])
    assert all(index.get(b"key%d" % number) == b"%d" % number for number in range(5000))
    assert not any(index.get(b"other%d" % number) for number in range(5000))


@pytest.mark.parametrize("length", [255, 256, 257, 5000])
def test_a_value_of_any_length_is_whole(path: Path, length: int) -> None:
    assert make(path, [(b"a", b"x" * length), (b"b", b"y")]).get(b"a") == b"x" * length


@pytest.mark.parametrize("size", [0, 1, TAG_SIZE, TAG_SIZE + 8, 57])
def test_a_file_that_is_not_whole_is_an_error(path: Path, size: int) -> None:
    make(path, [(b"abc", b"value")]).close()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedError):
        opened(path)


def test_a_file_that_is_emptied_under_its_reader_is_an_error(path: Path) -> None:
    index = make(path, [(b"abc", b"value")])
    os.truncate(path, 0)
    with pytest.raises(DamagedError):
        index.get(b"abc")


def test_whatever_is_written_into_a_file_its_reader_gets_a_value_or_an_error(path: Path) -> None:
    make(path, [(b"key%d" % number, b"value") for number in range(100)]).close()
    whole = path.read_bytes()
    source = random.Random(1)
    outcomes = set()
    for _ in range(3000):
        path.write_bytes(damaged(whole, 20, source))
        try:
            index = opened(path)
        except DamagedError as error:
            outcomes.add(str(error))
            continue
        try:
            outcomes.add("found" if index.get(b"key%d" % source.randrange(100)) else "not found")
        except DamagedError as error:
            outcomes.add(str(error))
        finally:
            index.close()
    assert outcomes >= {"found", "not found", "has been cut short", "is no index, or not a whole one"}


def test_more_than_an_index_can_hold_is_a_value_error() -> None:
    class Discarding(io.BytesIO):
        def write(self, data: object) -> int:
            return 1 << 31

    with pytest.raises(ValueError, match="more than 4 GiB"):
        write(Discarding(), [(b"a", b"1"), (b"b", b"2")], TAG)
