"""The type ``mysql``, against a real MariaDB."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps import mysql
from prefork_socketmap.maps.base import Map
from prefork_socketmap.maps.mysql import MysqlMap
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.mariadb import PASSWORD, Mariadb
from tests.integration.servers.process import Certificate
from tests.maps.opening import OpenMap
from tests.maps.sqlrows import QUERY, fill, login

Make = Callable[..., Map]


@pytest.fixture
def make(open_map: OpenMap, mariadb: Mariadb) -> Make:
    """Return a maker of maps on the server, whose table has some rows."""
    fill(mariadb)

    def make(query: str = QUERY, **table: object) -> Map:
        return open_map("mysql", query=query, **login(mariadb, table))

    return make


@pytest.mark.parametrize("key", ["x' OR '1'='1", "x\\' OR 1=1 -- ", "\\", "' UNION SELECT 'secret' -- "])
def test_a_key_cannot_change_the_statement_where_backslashes_do_not_quote(
    make: Make, mariadb: Mariadb, key: str
) -> None:
    mariadb.execute("SET GLOBAL sql_mode = 'NO_BACKSLASH_ESCAPES'")
    try:
        table = make()
        assert table.lookup(key) == Reply.not_found()
        assert table.lookup("it's") == Reply.ok("quoted")
    finally:
        mariadb.execute("SET GLOBAL sql_mode = DEFAULT")


def test_parts_of_the_key_are_parameters_in_their_order(make: Make) -> None:
    table = make("SELECT CONCAT('%d', ' ', '%u', ' 100%% ', '%2')")
    assert table.lookup("user@mail.example") == Reply.ok("mail.example user 100% mail")


def test_values_are_the_texts_that_postfix_would_get(make: Make) -> None:
    assert make("SELECT 1.50, DATE '2026-01-02', TIME '01:02:03', true, 0x41 FROM DUAL WHERE '%s' <> ''").lookup(
        "x"
    ) == Reply.ok("1.50,2026-01-02,01:02:03,1,A")


# A mailbox that needs no quotes. Where a key is pasted, with quotes around it, inside quotes, it is SQL.
ANOTHER_TABLE = "/**/union/**/select/**/password/**/from/**/users#@example.com"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT goto FROM alias # the user's\n WHERE address = '%s'",
        "SELECT goto FROM alias -- the user's\n WHERE address = '%s'",
        "SELECT goto FROM alias /* the user's */ WHERE address = '%s'",
        r"SELECT goto FROM alias WHERE goto <> '\'' AND address = '%s'",
        "SELECT goto FROM alias WHERE goto <> \"'\" AND address = '%s'",
        "SELECT goto AS `user's` FROM alias WHERE address = '%s'",
        'SELECT goto FROM alias WHERE address = "%s"',
    ],
)
def test_a_quote_in_a_query_gives_no_key_the_power_to_change_it(make: Make, mariadb: Mariadb, query: str) -> None:
    mariadb.execute("CREATE OR REPLACE TABLE users (password varchar(255))", "INSERT INTO users VALUES ('hunter2')")
    table = make(query)
    assert table.lookup(ANOTHER_TABLE) == Reply.not_found()
    assert table.lookup("secret") == Reply.ok("secret")
    assert table.lookup("it's") == Reply.ok("quoted")


@pytest.mark.parametrize("mode", ["ANSI_QUOTES", "NO_BACKSLASH_ESCAPES", "ANSI_QUOTES,NO_BACKSLASH_ESCAPES"])
def test_a_query_is_read_as_the_server_s_modes_say(make: Make, mariadb: Mariadb, mode: str) -> None:
    mariadb.execute(f"SET GLOBAL sql_mode = '{mode}'")
    query = {
        "ANSI_QUOTES": """SELECT goto AS "user's" FROM alias WHERE goto <> '\\'' AND address = '%s'""",
        "NO_BACKSLASH_ESCAPES": r"""SELECT goto FROM alias WHERE goto <> '\' AND address = "%s" """,
    }.get(mode, r"""SELECT goto AS "user's" FROM alias WHERE goto <> '\' AND address = '%s'""")
    try:
        table = make(query)
        assert table.lookup(ANOTHER_TABLE) == Reply.not_found()
        assert table.lookup("it's") == Reply.ok("quoted")
    finally:
        mariadb.execute("SET GLOBAL sql_mode = DEFAULT")


@pytest.mark.usefixtures("procedure")
@pytest.mark.parametrize("query", [QUERY, "CALL find('%s')", "SELECT goto FROM alias WHERE address IN ('%u', '%s')"])
def test_a_server_that_takes_only_variables_gets_variables(
    make: Make, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    # As MySQL is. MariaDB takes them, too.
    monkeypatch.setattr(mysql, "_takes_values", lambda _cursor: False)
    table = make(query)
    assert [table.lookup(key) for key in ("secret", "it's", "many", "müller@example.com")] == [
        Reply.ok("secret"),
        Reply.ok("quoted"),
        Reply.ok("a,b"),
        Reply.ok("ü"),
    ]
    assert table.lookup(ANOTHER_TABLE) == Reply.not_found()


def test_a_key_is_compared_in_the_collation_of_the_column(make: Make, mariadb: Mariadb) -> None:
    mariadb.execute(
        "CREATE OR REPLACE TABLE old (address varchar(255) CHARACTER SET latin1, "
        "exact varchar(255) CHARACTER SET utf8mb3 COLLATE utf8mb3_bin)",
        "INSERT INTO old VALUES ('müller', 'Müller')",
    )
    assert make("SELECT 'found' FROM old WHERE address = '%s'").lookup("MÜLLER") == Reply.ok("found")
    assert make("SELECT 'found' FROM old WHERE exact = '%s'").lookup("MÜLLER") == Reply.not_found()
    assert make("SELECT 'found' FROM old WHERE exact = '%s'", fold=False).lookup("Müller") == Reply.ok("found")
    assert make("SELECT 'found' FROM old WHERE 'x%s' = 'XMÜLLER'").lookup("müller") == Reply.ok("found")


def test_a_query_is_prepared_once_for_each_connection(make: Make, mariadb: Mariadb) -> None:
    count = "SELECT variable_value FROM information_schema.session_status WHERE variable_name = '%s'"
    table = make(count)
    assert [table.lookup("com_prepare_sql"), table.lookup("com_prepare_sql")] == [Reply.ok("1")] * 2
    mariadb.terminate_clients()
    assert table.lookup("com_prepare_sql") == Reply.ok("1")
    assert int(table.lookup("com_execute_sql").text) >= 2


def test_a_prepared_query_that_is_not_there_any_more_is_prepared_again(make: Make) -> None:
    table = make("SELECT goto FROM alias WHERE address = '%s'")
    table.lookup("secret")
    # As behind a proxy that has put another connection to the server in the place of the one that has it.
    assert isinstance(table, MysqlMap)
    with table.connect_now().cursor() as cursor:
        cursor.execute(f"DEALLOCATE PREPARE {table._name}")
    assert table.lookup("secret") == Reply.ok("secret")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELECT absent FROM alias WHERE address = '%s'", r"Unknown column 'absent' in '.*' \(1054\)$"),
        ("SELECT goto FROM alias WHERE address = '%s' AND", "error in your SQL syntax"),
        ("SELECT 1; SELECT goto FROM alias WHERE address = '%s'", "error in your SQL syntax"),
        # Legal in Postfix's own table, which pastes the key.
        ("SELECT goto FROM alias WHERE address = _latin1'%s'", "error in your SQL syntax"),
        ("SELECT goto AS '%s' FROM alias", "error in your SQL syntax"),
    ],
)
def test_a_wrong_query_is_told_when_it_is_asked_for(make: Make, query: str, error: str) -> None:
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{error}"):
        make(query).verify()
    with pytest.raises(SettingError, match=rf"maps\.m\.query: .*{error}"):
        make(query, connect="start")


@pytest.fixture
def procedure(mariadb: Mariadb) -> None:
    """A procedure that selects an alias, and nothing at all for the address "nothing"."""
    mariadb.execute(
        "CREATE OR REPLACE PROCEDURE find(IN wanted VARCHAR(255)) READS SQL DATA "
        "BEGIN IF wanted <> 'nothing' THEN SELECT goto FROM alias WHERE address = wanted; END IF; END"
    )


@pytest.mark.usefixtures("procedure")
def test_a_stored_procedure_can_be_called_again_and_again(make: Make) -> None:
    table = make("CALL find('%s')")
    assert [table.lookup("secret"), table.lookup("missing"), table.lookup("secret")] == [
        Reply.ok("secret"),
        Reply.not_found(),
        Reply.ok("secret"),
    ]


@pytest.mark.usefixtures("procedure")
@pytest.mark.parametrize(
    ("required", "reply"),
    [(True, Reply.temp_fail("map m: the query has no result set")), (False, Reply.not_found())],
)
def test_a_missing_result_set_is_what_require_result_set_says(make: Make, required: bool, reply: Reply) -> None:
    table = make("CALL find('%s')", require_result_set=required)
    assert table.lookup("nothing") == reply
    assert table.lookup("secret") == Reply.ok("secret")


def test_a_statement_that_takes_too_long_is_a_temporary_failure_and_not_tried_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    table = make("SELECT SLEEP(IF('%s' = 'long', 60, 0))", timeout=2)
    assert table.lookup("short") == Reply.ok("0")
    assert table.lookup("long") == Reply.temp_fail("map m: the backend is not available")
    assert "no answer within 2 s" in caplog.text


def test_a_unix_socket_is_a_host_and_needs_no_tls(make: Make, mariadb: Mariadb) -> None:
    query = (
        "SELECT CONCAT('<', variable_value, '>') FROM information_schema.session_status WHERE variable_name = '%s'"
    )
    assert make(query, hosts=[f"unix:{mariadb.socket}"]).lookup("ssl_cipher") == Reply.ok("<>")


def test_tls_is_verified(make: Make, mariadb: Mariadb, tmp_path: Path) -> None:
    query = "SELECT variable_value <> '' FROM information_schema.session_status WHERE variable_name = '%s'"
    (tmp_path / "ca.pem").write_bytes(mariadb.tls.certificate.read_bytes())
    assert make(query, tls_CAfile="ca.pem").lookup("ssl_cipher") == Reply.ok("1")
    other = Certificate(tmp_path, "root").certificate
    assert make(query, tls_CAfile=str(other)).lookup("ssl_cipher").status is Status.TEMP
    assert make(query, tls_CAfile=str(other), tls_verify_cert=False).lookup("ssl_cipher") == Reply.ok("1")


def test_an_option_file_has_what_is_not_set_of_the_login_and_of_tls(
    open_map: OpenMap, mariadb: Mariadb, tmp_path: Path
) -> None:
    quoted = PASSWORD.replace("\\", "\\\\")
    (tmp_path / "my.cnf").write_text(
        f'[client]\nuser=postfix\npassword="{quoted}"\nhost=nowhere\nssl-ca={mariadb.tls.certificate}\n'
    )
    query = "SELECT variable_value <> '' FROM information_schema.session_status WHERE variable_name = '%s'"
    host = {"hosts": [f"127.0.0.1:{mariadb.port}"], "dbname": "mail", "query": query}
    table = open_map("mysql", **host, option_file="my.cnf")
    assert table.lookup("ssl_cipher") == Reply.ok("1")
    # What is set comes first.
    assert open_map("mysql", **host, option_file="my.cnf", password="x").lookup("ssl_cipher").status is Status.TEMP
    # A new password is used without a reload.
    (tmp_path / "my.cnf").write_text("[client]\nuser=postfix\npassword=wrong\n")
    mariadb.terminate_clients()
    assert table.lookup("ssl_cipher").status is Status.TEMP


def test_no_error_and_no_log_line_has_the_password(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    table = make(password="hunter2")
    reply = table.lookup("secret")
    assert reply == Reply.temp_fail("map m: the backend is not available")
    assert "Access denied for user 'postfix'" in caplog.text
    assert "hunter2" not in caplog.text + repr(reply) + repr(table)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"hosts": ["http://host/"]}, r"maps\.m\.hosts: 'http://host/' is not accepted"),
        ({"tls_CAfile": "none"}, r"maps\.m\.tls_CAfile: cannot be used"),
        ({"option_file": "none"}, r"maps\.m\.option_file: cannot be read: No such file"),
        ({"option_group": "x"}, r"maps\.m\.option_group: goes with option_file only"),
        ({"tls_cert_file": "none"}, r"maps\.m\.tls_cert_file: cannot be used"),
        ({"requre_result_set": True}, r"maps\.m\.requre_result_set: .*did you mean .require_result_set"),
    ],
)
def test_a_wrong_setting_is_named(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error):
        open_map("mysql", **{"hosts": ["h"], "query": QUERY, **table})
