"""Option files of MySQL's clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefork_socketmap.maps import optionfile


def read(path: Path, text: str, *groups: str) -> dict[str, str]:
    path.write_text(text)
    return optionfile.read(path, groups or ("client",))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("password=x", "x"),
        (" password =  a b ", "a b"),
        ("password=x#y ; z", "x#y ; z"),
        ("password='x # y'", "x # y"),
        ('password="x\'y"', "x'y"),
        (r"password=a\\b\sc\t", "a\\b c\t"),
        (r"password=a\qb", r"a\qb"),
        ("PassWord=x", "x"),
        ("loose_password=x", "x"),
        ("password=a=b", "a=b"),
        ("password", ""),
        ("#password=x\npassword=y", "y"),
        (";password=x\npassword=y", "y"),
        ("password=x\npassword=y", "y"),
    ],
)
def test_a_value_is_read_as_the_manual_says(tmp_path: Path, line: str, value: str) -> None:
    assert read(tmp_path / "cnf", f"[client]\n{line}\n") == {"password": value}


def test_the_groups_that_are_asked_for_are_read_and_no_others(tmp_path: Path) -> None:
    text = "user=0\n[mysqld]\nuser=1\n[client]\nuser=2\nssl_ca=a\n[mine]\nuser=3\n[mysql]\nuser=4\n"
    assert read(tmp_path / "cnf", text) == {"user": "2", "ssl-ca": "a"}
    assert read(tmp_path / "cnf", text, "client", "mine") == {"user": "3", "ssl-ca": "a"}


def test_included_files_are_read_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/b.cnf").write_text("[client]\nuser=b\n")
    (tmp_path / "conf.d/a.cnf").write_text("[client]\nuser=a\nport=1\n")
    (tmp_path / "conf.d/c.txt").write_text("[client]\nuser=c\n")
    (tmp_path / "one").write_text("[client]\nport=2\n")
    text = "[client]\nuser=x\n!includedir conf.d\n!include one\n"
    assert read(tmp_path / "cnf", text) == {"user": "b", "port": "2"}


def test_files_that_include_each_other_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="includes itself"):
        read(tmp_path / "cnf", "!include cnf\n")
