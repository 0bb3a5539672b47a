"""The type ``postgresql``, against a real server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.postgresql import DATABASE, PASSWORD, Postgresql
from tests.integration.servers.process import Certificate
from tests.maps.opening import OpenMap
from tests.waiting import eventually

Make = Callable[..., Map]
QUERY = "SELECT goto FROM alias WHERE address = '%s'"
TEMP = Reply.temp_fail("map m: the query failed")


@pytest.fixture
def make(open_map: OpenMap, postgresql: Postgresql) -> Make:
    """Return a maker of maps on the server, whose table has some rows."""
    postgresql.execute(
        "INSERT INTO alias VALUES ('info@example.com', 'staff@example.net'), ('many', 'a'), ('many', 'b'),"
        "('null', NULL), ('empty', ''), ('it''s', 'quoted'), ('secret', 'secret'), ('müller@example.com', 'ü'),"
        "('@example.org', 'catch-all')"
    )

    def make(query: str = QUERY, **table: object) -> Map:
        login = {"hosts": [f"127.0.0.1:{postgresql.port}"], "dbname": DATABASE, "user": "postfix"}
        if not {"password_file", "password_env"} & set(table):
            login["password"] = PASSWORD
        return open_map("postgresql", query=query, **{**login, **table})

    return make


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("info@example.com", Reply.ok("staff@example.net")),
        ("INFO@Example.com", Reply.ok("staff@example.net")),
        ("müller@example.com", Reply.ok("ü")),
        ("it's", Reply.ok("quoted")),
        ("null", Reply.not_found()),
        ("empty", Reply.not_found()),
        ("missing", Reply.not_found()),
        ("\udcff", Reply.not_found()),
    ],
)
@pytest.mark.parametrize("query", [QUERY, "SELECT goto FROM alias WHERE address = %s"])
def test_the_query_answers(make: Make, query: str, key: str, reply: Reply) -> None:
    assert make(query).lookup(key) == reply


def test_every_column_of_every_row_is_a_value(make: Make) -> None:
    assert make("SELECT address, goto FROM alias WHERE address = '%s'").lookup("many") == Reply.ok("many,a,many,b")


def test_a_value_that_is_null_is_not_found_with_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make().lookup("null")
    assert "'null' has an empty value" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "x' OR '1'='1",
        "x'; DROP TABLE alias; --",
        "x\\' OR 1=1 --",
        "' UNION SELECT 'secret' --",
        "$1",
        "%s",
        "%' OR address LIKE '%",
    ],
)
@pytest.mark.parametrize("query", [QUERY, "SELECT goto FROM alias WHERE address = '%u'"])
def test_a_key_cannot_change_the_statement(make: Make, query: str, key: str) -> None:
    table = make(query)
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("secret") == Reply.ok("secret")


def test_parts_of_the_key_are_parameters_in_their_order(make: Make) -> None:
    table = make("SELECT '%d' || ' ' || '%u' || ' 100%% ' || '%2'")
    assert table.lookup("user@mail.example") == Reply.ok("mail.example user 100% mail")


def test_values_are_the_texts_that_postfix_would_get(make: Make) -> None:
    assert make("SELECT true, 1.50, DATE '2026-01-02', ARRAY[1,2] WHERE '%s' <> ''").lookup("x") == Reply.ok(
        "t,1.50,2026-01-02,{1,2}"
    )


def test_a_catch_all_works(make: Make) -> None:
    assert make(search="address").lookup("anybody@example.org") == Reply.ok("catch-all")


def test_the_result_format_and_the_domain_list_are_postfix_s(make: Make) -> None:
    table = make(result_format="%u at %d for %U", domain=["example.com"])
    assert table.lookup("info@example.com") == Reply.ok("staff at example.net for info")
    assert table.lookup("@example.org") == Reply.not_found()


def test_the_expansion_limit_is_a_temporary_failure(make: Make) -> None:
    assert make(expansion_limit=1).lookup("many").status is Status.TEMP


def test_a_wrong_statement_is_a_temporary_failure_that_tells_the_client_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    assert make("SELECT missing FROM alias WHERE address = '%s'").lookup("key") == TEMP
    assert 'column "missing" does not exist' in caplog.text


def test_the_connection_survives_a_failed_statement(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = make("SELECT 1 / (length('%s') - 1)")
    assert [table.lookup("x"), table.lookup("xx")] == [TEMP, Reply.ok("1")]
    assert caplog.text.count("connected to") == 1


def test_a_statement_that_takes_too_long_is_cancelled_on_the_server(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    table = make("SELECT 'slept' FROM pg_sleep(CASE '%s' WHEN 'long' THEN 60 ELSE 0 END)", timeout=3)
    assert table.lookup("long") == TEMP
    assert table.lookup("short") == Reply.ok("slept")
    assert "statement timeout" in caplog.text


def test_a_connection_that_was_cut_is_replaced_within_the_lookup(make: Make, postgresql: Postgresql) -> None:
    table = make()
    table.lookup("secret")
    postgresql.terminate_clients()
    assert table.lookup("secret") == Reply.ok("secret")


def test_a_unix_socket_is_a_host(make: Make, postgresql: Postgresql) -> None:
    table = make(hosts=[f"unix:{postgresql.directory}/.s.PGSQL.{postgresql.port}"])
    assert table.lookup("secret") == Reply.ok("secret")


def test_a_uri_is_a_host_and_its_parameters_come_first(make: Make, postgresql: Postgresql) -> None:
    uri = f"postgresql://postfix@127.0.0.1:{postgresql.port}/{DATABASE}?application_name=mine"
    table = make("SELECT current_setting('application_name') WHERE '%s' <> ''", hosts=[uri], user="x", dbname="y")
    assert table.lookup("x") == Reply.ok("mine")


def test_tls_is_verified(make: Make, postgresql: Postgresql, tmp_path: Path) -> None:
    query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND '%s' <> ''"
    (tmp_path / "ca.pem").write_bytes(postgresql.tls.certificate.read_bytes())
    assert make(query, sslmode="verify-full", sslrootcert="ca.pem").lookup("x") == Reply.ok("t")
    other = Certificate(tmp_path, "root").certificate
    assert make(query, sslmode="verify-full", sslrootcert=str(other)).lookup("x").status is Status.TEMP


@pytest.mark.parametrize("source", ["password_file", "password_env"])
def test_the_password_can_be_elsewhere(
    make: Make, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    monkeypatch.setenv("THE_PASSWORD", PASSWORD)
    place = {"password_file": "password", "password_env": "THE_PASSWORD"}[source]
    assert make(**{source: place}).lookup("secret") == Reply.ok("secret")


def test_a_password_that_was_changed_in_its_file_is_used_at_the_next_attempt(make: Make, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wrong")
    table = make(password_file="password")
    assert table.lookup("secret") == Reply.temp_fail("map m: the backend is not available")
    (tmp_path / "password").write_text(PASSWORD)
    eventually(lambda: table.lookup("secret") == Reply.ok("secret"), within=30)


def test_no_error_and_no_log_line_has_the_password(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    table = make(password="hunter2", sslmode="disable")
    reply = table.lookup("secret")
    assert reply.status is Status.TEMP
    assert 'password authentication failed for user "postfix"' in caplog.text
    assert "hunter2" not in caplog.text + repr(reply) + repr(table)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"hosts": ["host:port"]}, r"maps\.m\.hosts: 'host:port' is not accepted"),
        ({"hosts": []}, r"maps\.m\.hosts: \[\] is not accepted"),
        ({"hosts": ["postgresql://u:hunter2@h/d"]}, r"maps\.m\.hosts: has a password in a URI; use password"),
        ({"hosts": ["postgresql://u@h:hunter2/d?x=y"]}, r"maps\.m\.hosts: has a URI that libpq does not understand"),
        ({"password": "hunter2", "password_env": "X"}, r"maps\.m\.password: only one of password, password_file"),
        ({"password_env": "NO_SUCH_VARIABLE"}, r"maps\.m\.password_env: the environment has no variable NO_SUCH"),
        ({"password_file": "none"}, r"maps\.m\.password_file: cannot read .*/none: No such file"),
        ({"password": 123456}, r"maps\.m\.password: expected a string that is not empty"),
        ({"timeout": 0}, r"maps\.m\.timeout: 0 is not accepted"),
        ({"query": "SELECT '%x'"}, r"maps\.m\.query: '%x' in .* is no part of a key"),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error) as caught:
        open_map("postgresql", **{"hosts": ["h"], "query": QUERY, **table})
    assert "hunter2" not in str(caught.value)
    assert "123456" not in str(caught.value)
