"""Index files."""

from __future__ import annotations

import io
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork_socketmap.maps.index import TAG_SIZE, Index, write

TAG = bytes(range(TAG_SIZE))
keys = st.binary().filter(lambda key: b"\0" not in key)
values = st.binary().filter(lambda value: b"\n" not in value)


def make(path: Path, entries: list[tuple[bytes, bytes]]) -> Index:
    with path.open("wb") as file:
        write(file, entries, TAG)
    return Index(path)


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


@pytest.mark.parametrize("size", [0, 1, TAG_SIZE, TAG_SIZE + 8, 57])
def test_a_file_that_is_not_whole_is_a_value_error(path: Path, size: int) -> None:
    make(path, [(b"abc", b"value")]).close()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"."):
        Index(path)


def test_more_than_an_index_can_hold_is_a_value_error() -> None:
    class Discarding(io.BytesIO):
        def write(self, data: object) -> int:
            return 1 << 31

    with pytest.raises(ValueError, match="more than 4 GiB"):
        write(Discarding(), [(b"a", b"1"), (b"b", b"2")], TAG)
