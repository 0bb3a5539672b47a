"""The type ``postgresql``, against a real server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.pgbouncer import Pgbouncer
from tests.integration.servers.postgresql import DATABASE, PASSWORD, Postgresql
from tests.integration.servers.process import Certificate, running
from tests.maps.opening import OpenMap
from tests.maps.sqlrows import QUERY, fill, login
from tests.waiting import eventually

Make = Callable[..., Map]
TEMP = Reply.temp_fail("map m: the query failed")


@pytest.fixture
def make(open_map: OpenMap, postgresql: Postgresql) -> Make:
    """Return a maker of maps on the server, whose table has some rows."""
    fill(postgresql)

    def make(query: str = QUERY, **table: object) -> Map:
        return open_map("postgresql", query=query, **login(postgresql, table))

    return make


def test_parts_of_the_key_are_parameters_in_their_order(make: Make) -> None:
    table = make("SELECT '%d' || ' ' || '%u' || ' 100%% ' || '%2'")
    assert table.lookup("user@mail.example") == Reply.ok("mail.example user 100% mail")


def test_values_are_the_texts_that_postfix_would_get(make: Make) -> None:
    assert make("SELECT true, 1.50, DATE '2026-01-02', ARRAY[1,2] WHERE '%s' <> ''").lookup("x") == Reply.ok(
        "t,1.50,2026-01-02,{1,2}"
    )


def test_the_result_format_and_the_domain_list_are_postfix_s(make: Make) -> None:
    table = make(result_format="%u at %d for %U", domain=["example.com"])
    assert table.lookup("info@example.com") == Reply.ok("staff at example.net for info")
    assert table.lookup("@example.org") == Reply.not_found()


def test_the_expansion_limit_is_a_temporary_failure(make: Make) -> None:
    assert make(expansion_limit=1).lookup("many").status is Status.TEMP


@pytest.mark.parametrize(
    "query",
    [
        "SELECT goto FROM alias -- the user's\n WHERE address = '%s'",
        "SELECT goto FROM alias /* the /* user's */ */ WHERE address = '%s'",
        "SELECT goto FROM alias WHERE goto <> E'\\'' AND address = '%s'",
        "SELECT goto FROM alias WHERE goto <> $$'$$ AND address = '%s'",
        """SELECT goto AS "user's" FROM alias WHERE address = '%s'""",
        "SELECT goto FROM alias WHERE address = text '%s'",
        "SELECT goto FROM alias WHERE address = E'%s'",
        "SELECT goto FROM alias WHERE address = $$%s$$",
        "SELECT goto FROM alias WHERE json_build_object('k', address)::text = json_build_object('k','%s')::text",
        "SELECT goto FROM alias WHERE to_jsonb(address) = to_jsonb('%s'::text)",
        "SELECT goto FROM alias WHERE address = ANY (ARRAY['%u', '%s'])",
        "SELECT goto FROM alias WHERE address IN (SELECT concat('%s', ''))",
        "SELECT goto FROM alias WHERE format('%%s', '%s') = address",
        "SELECT goto FROM alias WHERE ROW(address, '%s') = ROW(address, address)",
    ],
)
def test_a_query_is_understood_as_the_server_does(make: Make, query: str) -> None:
    table = make(query)
    assert table.lookup("secret") == Reply.ok("secret")
    assert table.lookup("it's") == Reply.ok("quoted")
    assert table.lookup("' UNION SELECT 'secret' --") == Reply.not_found()


def test_a_part_has_the_type_that_is_wanted_where_it_stands(make: Make, postgresql: Postgresql) -> None:
    postgresql.execute(
        "CREATE TABLE IF NOT EXISTS typed (id int, network cidr, day date, kind bool)",
        "TRUNCATE typed",
        "INSERT INTO typed VALUES (7, '192.0.2.0/24', '2026-01-02', true)",
        "GRANT SELECT ON typed TO postfix",
    )
    for condition, key, wrong in [
        ("id = '%s'", "7", "user"),
        ("id = %s", "7", "user"),
        ("network >> '%s'", "192.0.2.7", "user"),
        ("network >> inet '%s'", "192.0.2.7", "user"),
        ("day = '%s'", "2026-01-02", "user"),
        ("kind = '%s'", "t", "user"),
    ]:
        table = make(f"SELECT 'found' FROM typed WHERE {condition}")
        assert table.lookup(key) == Reply.ok("found"), condition
        # As in Postfix's own table, where it is an error, too.
        assert table.lookup(wrong) == TEMP, condition


def test_a_query_is_read_as_standard_conforming_strings_says(make: Make, postgresql: Postgresql) -> None:
    query = r"SELECT goto FROM alias WHERE goto <> '\'' AND address = '%s'"
    postgresql.execute("ALTER ROLE postfix SET standard_conforming_strings = off")
    try:
        table = make(query)
        assert table.lookup("it's") == Reply.ok("quoted")
        assert table.lookup("' UNION SELECT 'secret' --") == Reply.not_found()
    finally:
        postgresql.execute("ALTER ROLE postfix RESET standard_conforming_strings")
    assert make(query).lookup("it's") == TEMP


def test_a_query_is_prepared_once_for_each_connection(make: Make, postgresql: Postgresql) -> None:
    table = make("SELECT count(*), sum(generic_plans + custom_plans) FROM pg_prepared_statements WHERE '%s' <> ''")
    assert [table.lookup("x"), table.lookup("x"), table.lookup("x")] == [
        Reply.ok("1,1"),
        Reply.ok("1,2"),
        Reply.ok("1,3"),
    ]
    postgresql.terminate_clients()
    assert table.lookup("x") == Reply.ok("1,1")


def test_a_table_that_is_altered_is_asked_on_the_same_connection(
    make: Make, postgresql: Postgresql, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    postgresql.execute(
        "DROP TABLE IF EXISTS altered", "CREATE TABLE altered (a text)", "GRANT SELECT ON altered TO postfix"
    )
    postgresql.execute("INSERT INTO altered VALUES ('x')")
    table = make("SELECT * FROM altered WHERE a = '%s'")
    assert table.lookup("x") == Reply.ok("x")
    postgresql.execute("ALTER TABLE altered ADD b text DEFAULT 'y'")
    assert [table.lookup("x"), table.lookup("x")] == [Reply.ok("x,y")] * 2
    assert caplog.text.count("connected to") == 1


@pytest.mark.parametrize("forgets", [False, True])
def test_behind_a_pooler_every_client_gets_its_own_answers(
    make: Make, postgresql: Postgresql, caplog: pytest.LogCaptureFixture, forgets: bool
) -> None:
    caplog.set_level(logging.INFO)
    with running(Pgbouncer(postgresql, forgets=forgets)) as pooler:
        hosts = [f"127.0.0.1:{pooler.port}"]
        query = "SELECT goto FROM alias WHERE json_build_array('%s')->>0 = address"
        tables = [make(query, hosts=hosts), make(query, hosts=hosts), make("SELECT 'other %s'", hosts=hosts)]
        for _ in range(3):
            assert [table.lookup("secret").text for table in tables] == ["secret", "secret", "other secret"]
        assert ("sent with each lookup: prepared statement" in caplog.text) is forgets
        # Once for each map: then it is known.
        assert caplog.text.count("is not told the time limit of a query") == len(tables)
        tables[0].close()
        tables[0].open()
        assert tables[0].lookup("secret") == Reply.ok("secret")
        assert caplog.text.count("is not told the time limit of a query") == len(tables)
        with pytest.raises(SettingError, match=r'maps\.m\.query: column "missing" does not exist'):
            make("SELECT missing FROM alias WHERE address = '%s'", hosts=hosts).verify()


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELECT goto FROM alias WHERE address = '%s' AND", "syntax error at end of input"),
        ("SELECT 1; SELECT goto FROM alias WHERE address = '%s'", "cannot insert multiple commands"),
        # Legal in Postfix's own table, which pastes the key.
        ("SELECT interval '%s' day", "syntax error"),
        ("SELECT N'%s'", "syntax error"),
        ("SELECT double precision '%s'", "syntax error"),
    ],
)
def test_a_wrong_query_is_told_when_it_is_asked_for(make: Make, query: str, error: str) -> None:
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{error}"):
        make(query).verify()
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{error}"):
        make(query, connect="start")


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
        ({"password_env": "NO_SUCH_VARIABLE"}, r"maps\.m\.password_env: the environment has no such variable"),
        ({"password_file": "none"}, r"maps\.m\.password_file: cannot read the file: No such file"),
        ({"password": 123456}, r"maps\.m\.password: expected a string that is not empty"),
        ({"timeout": 0}, r"maps\.m\.timeout: 0 is not accepted"),
        ({"query": "SELECT '%x'"}, r"maps\.m\.query: '%x' is no part of a key"),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error) as caught:
        open_map("postgresql", **{"hosts": ["h"], "query": QUERY, **table})
    assert "hunter2" not in str(caught.value)
    assert "123456" not in str(caught.value)
