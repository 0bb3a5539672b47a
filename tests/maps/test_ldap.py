"""The type ``ldap``, against a real slapd."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.process import Certificate
from tests.integration.servers.slapd import PASSWORD, READER, SUFFIX, Slapd
from tests.maps.opening import OpenMap

Make = Callable[..., Map]
PERSON = ["inetOrgPerson"]


@pytest.fixture
def make(open_map: OpenMap, slapd: Slapd) -> Make:
    """Return a maker of maps on the server, which has some people and groups.

    ``description`` has the address that is asked for, ``ou`` the one that is answered.
    """
    for name in ("info", "secret", "müller", "par(en)*s"):
        address = f"{name}@example.com"
        slapd.add(f"cn={name}", objectClass=PERSON, sn="x", description=address, ou=f"{name}@example.net")
    slapd.add("cn=many", objectClass=PERSON, sn="x", description="many@example.com", ou=["a", "b"])
    slapd.add("cn=silent", objectClass=PERSON, sn="x", description="silent@example.com")
    slapd.add("cn=catchall", objectClass=PERSON, sn="x", description="@example.org", ou="catch-all")
    slapd.add(
        "cn=staff",
        objectClass=["groupOfNames", "extensibleObject"],
        description="staff@example.com",
        member=[f"cn=info,{SUFFIX}", f"cn=many,{SUFFIX}", f"cn=former,{SUFFIX}"],
        ou="the group itself",
    )
    slapd.add(
        "cn=loop", objectClass=["groupOfNames", "extensibleObject"], description="loop", member=f"cn=loop,{SUFFIX}"
    )

    def make(**table: object) -> Map:
        defaults: dict[str, object] = {
            "hosts": [f"127.0.0.1:{slapd.port}"],
            "bind_dn": READER,
            "bind_pw": PASSWORD,
            "search_base": SUFFIX,
            "query_filter": "(description=%s)",
            "result_attribute": ["ou"],
        }
        return open_map("ldap", **{**defaults, **table})

    return make


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("info@example.com", Reply.ok("info@example.net")),
        ("INFO@Example.com", Reply.ok("info@example.net")),
        ("müller@example.com", Reply.ok("müller@example.net")),
        ("par(en)*s@example.com", Reply.ok("par(en)*s@example.net")),
        ("many@example.com", Reply.ok("a,b")),
        ("silent@example.com", Reply.not_found()),
        ("missing@example.com", Reply.not_found()),
        ("\udcff", Reply.not_found()),
    ],
)
def test_the_search_answers(make: Make, key: str, reply: Reply) -> None:
    assert make().lookup(key) == reply


@pytest.mark.parametrize(
    "key", ["*", "x)(description=*", "s*@example.com", "x)(|(description=secret@example.com", "\\2a", "x\\", "info)("]
)
@pytest.mark.parametrize(
    "query_filter", ["(description=%s)", "description=%s", "(&(objectClass=*)(description=%u@example.com))"]
)
def test_a_key_cannot_change_the_filter(make: Make, query_filter: str, key: str) -> None:
    table = make(query_filter=query_filter)
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("secret@example.com") == Reply.ok("secret@example.net")


@pytest.mark.parametrize(
    "key",
    [
        "hidden,cn=secret",
        f"secret,{SUFFIX}",
        "secret+sn=x",
        "x,cn=secret",
        "#04017a",
        '"',
        " ",
        "a;b",
        "<>",
        "\\",
        "x\\2c",
    ],
)
def test_a_key_cannot_change_the_base(make: Make, slapd: Slapd, key: str) -> None:
    slapd.add("cn=hidden,cn=secret", objectClass=PERSON, sn="x", ou="hidden")
    slapd.add("cn=a\\2cb", objectClass=PERSON, sn="x", ou="comma")
    table = make(search_base=f"cn=%u,{SUFFIX}", scope="base", query_filter="(objectClass=*)")
    assert table.lookup(key) == Reply.not_found()
    assert table.lookup("secret@anywhere") == Reply.ok("secret@example.net")
    assert table.lookup("a,b") == Reply.ok("comma")


def test_a_base_that_is_not_there_is_an_error_unless_it_is_made_of_the_key(make: Make) -> None:
    assert make(search_base=f"ou=%d,{SUFFIX}").lookup("info@example.com") == Reply.not_found()
    assert make(search_base=f"ou=none,{SUFFIX}").lookup("info@example.com") == Reply.temp_fail(
        "map m: the query failed"
    )


def test_the_scope_is_observed(make: Make) -> None:
    assert make(scope="base").lookup("info@example.com") == Reply.not_found()
    assert make(scope="one").lookup("info@example.com") == Reply.ok("info@example.net")


def test_a_catch_all_works(make: Make) -> None:
    assert make(search="address").lookup("anybody@example.org") == Reply.ok("catch-all")


def test_a_group_is_the_addresses_of_its_members_who_are_still_there(make: Make) -> None:
    table = make(result_attribute=["mail"], special_result_attribute=["member"], leaf_result_attribute=["ou"])
    assert table.lookup("staff@example.com") == Reply.ok("info@example.net,a,b")


def test_a_result_attribute_of_the_group_counts_as_well(make: Make) -> None:
    table = make(special_result_attribute=["member"])
    assert table.lookup("staff@example.com") == Reply.ok("info@example.net,a,b,the group itself")


def test_the_cipher_suite_of_tls_is_told(make: Make, slapd: Slapd) -> None:
    # The words are GnuTLS's or OpenSSL's, whichever the library was built with; this one is in neither.
    settings = {"start_tls": True, "tls_ca_cert_file": str(slapd.tls.certificate)}
    assert make(**settings).lookup("info@example.com") == Reply.ok("info@example.net")
    wrong = make(**settings, tls_cipher_suite="NO-SUCH-CIPHER").lookup("info@example.com")
    assert wrong == Reply.temp_fail("map m: the backend is not available")


def test_a_terminal_attribute_ends_the_search(make: Make) -> None:
    table = make(
        result_attribute=["description"], special_result_attribute=["member"], terminal_result_attribute=["ou"]
    )
    assert table.lookup("staff@example.com") == Reply.ok("the group itself")


def test_a_url_is_followed_with_the_attributes_that_it_names(make: Make, slapd: Slapd) -> None:
    slapd.add(
        "cn=urls",
        objectClass=[*PERSON, "extensibleObject"],
        sn="x",
        description="urls@example.com",
        labeledURI=[
            f"ldap:///{SUFFIX}?ou?sub?(description=m*@example.com)",
            f"ldap:///cn=secret,{SUFFIX}?description?base",
        ],
    )
    table = make(special_result_attribute=["labeledURI"])
    found = table.lookup("urls@example.com")
    assert sorted(found.text.split(",")) == ["a", "b", "müller@example.net"]


def test_a_group_in_itself_is_a_temporary_failure(make: Make) -> None:
    table = make(special_result_attribute=["member"], recursion_limit=20)
    assert table.lookup("loop") == Reply.temp_fail("map m: more than recursion_limit = 20 entries lead to each other")


def test_the_size_limit_is_a_temporary_failure(make: Make) -> None:
    assert make(query_filter="(&(sn=x)(!(description=%s)))", size_limit=2).lookup("x").status is Status.TEMP
    assert make(query_filter="(&(sn=x)(!(description=%s)))", expansion_limit=2).lookup("x").status is Status.TEMP
    assert make(query_filter="(description=%s)", size_limit=2).lookup("info@example.com").status is Status.OK


def test_an_invalid_filter_is_told_before_anybody_is_asked(make: Make, slapd: Slapd) -> None:
    slapd.stop()
    with pytest.raises(SettingError, match=r"maps\.m\.query_filter: .* expected a filter"):
        make(query_filter="(description=%s")
    make(query_filter="(&(description=%s)(|(ou=%u)(ou=%d)(ou=%9)))")
    slapd.start()


def test_a_connection_that_was_cut_is_replaced_within_the_lookup(make: Make, slapd: Slapd) -> None:
    table = make()
    table.lookup("info@example.com")
    slapd.stop()
    slapd.start()
    assert table.lookup("info@example.com") == Reply.ok("info@example.net")


def test_without_a_name_the_login_is_anonymous(open_map: OpenMap, make: Make, slapd: Slapd) -> None:
    where = {"hosts": [f"127.0.0.1:{slapd.port}"], "search_base": SUFFIX, "query_filter": "(description=%s)"}
    # This server shows an anonymous client nothing, not even that there is something.
    assert open_map("ldap", **where).lookup("info@example.com") == Reply.temp_fail("map m: the query failed")


@pytest.mark.parametrize("start_tls", [False, True])
def test_tls_is_verified(make: Make, slapd: Slapd, tmp_path: Path, start_tls: bool) -> None:
    (tmp_path / "ca.pem").write_bytes(slapd.tls.certificate.read_bytes())
    other = str(Certificate(tmp_path, "root").certificate)
    url = f"ldap://127.0.0.1:{slapd.port}" if start_tls else f"ldaps://127.0.0.1:{slapd.tls_port}"

    def lookup(**table: object) -> Reply:
        return make(hosts=[url], start_tls=start_tls, **table).lookup("info@example.com")

    assert lookup(tls_ca_cert_file="ca.pem") == Reply.ok("info@example.net")
    assert lookup(tls_ca_cert_file=other) == Reply.temp_fail("map m: the backend is not available")
    assert lookup(tls_ca_cert_file=other, tls_require_cert=False) == Reply.ok("info@example.net")


def test_the_version_of_the_protocol_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make(version=2).lookup("info@example.com") == Reply.temp_fail("map m: the backend is not available")
    assert "historical protocol version requested" in caplog.text


def test_sasl_that_is_too_weak_is_refused(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    sasl = {"bind": "sasl", "bind_dn": "postfix", "sasl_mechs": ["SCRAM-SHA-256"]}
    assert make(**sasl).lookup("info@example.com") == Reply.ok("info@example.net")
    table = make(**sasl, sasl_minssf=56)
    assert table.lookup("info@example.com") == Reply.temp_fail("map m: the backend is not available")
    assert PASSWORD not in caplog.text


def test_sasl_can_act_as_another_only_if_the_server_lets_it(make: Make) -> None:
    sasl = {"bind": "sasl", "bind_dn": "postfix", "sasl_mechs": ["SCRAM-SHA-256"]}
    assert make(**sasl, sasl_authz_id="u:postfix").lookup("info@example.com") == Reply.ok("info@example.net")
    denied = make(**sasl, sasl_authz_id="u:somebody").lookup("info@example.com")
    assert denied == Reply.temp_fail("map m: the backend is not available")


def test_the_password_can_be_in_a_file(open_map: OpenMap, make: Make, slapd: Slapd, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    table = open_map(
        "ldap",
        hosts=[f"127.0.0.1:{slapd.port}"],
        bind_dn=READER,
        bind_pw_file="password",
        search_base=SUFFIX,
        query_filter="(description=%s)",
        result_attribute=["ou"],
    )
    assert table.lookup("info@example.com") == Reply.ok("info@example.net")


def test_no_error_and_no_log_line_has_the_password(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    table = make(bind_pw="hunter2")
    reply = table.lookup("info@example.com")
    assert reply == Reply.temp_fail("map m: the backend is not available")
    assert "Invalid credentials" in caplog.text
    assert "hunter2" not in caplog.text + repr(reply) + repr(table)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"search_base": "no dn"}, r"maps\.m\.search_base: 'no...' is not accepted here; expected a DN"),
        ({"scope": "subtree"}, r"maps\.m\.scope: 'subtree' is not accepted here; expected one of"),
        ({"dereference": 4}, r"maps\.m\.dereference: 4 is not accepted here"),
        ({"result_attribute": []}, r"maps\.m\.result_attribute: \[\] is not accepted here"),
        ({"recursion_limit": 0}, r"maps\.m\.recursion_limit: 0 is not accepted here"),
        ({"hosts": ["http://host"]}, r"maps\.m\.hosts: 'http://host' is not accepted here"),
        ({"version": 4}, r"maps\.m\.version: 4 is not accepted here"),
        ({"bind": "yes"}, r"maps\.m\.bind: 'yes' is not accepted here; expected one of \"simple\", \"sasl\""),
        ({"bind": "sasl", "version": 2}, r"maps\.m\.version: has to be 3 with bind = \"sasl\""),
        ({"sasl_realm": "x"}, r"maps\.m\.sasl_realm: goes with bind = \"sasl\" only"),
        ({"bind_pw_env": "NO_SUCH_VARIABLE"}, r"maps\.m\.bind_pw_env: the environment has no such variable"),
    ],
)
def test_a_wrong_setting_is_named(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error):
        open_map("ldap", **{"hosts": ["h"], "search_base": SUFFIX, **table})
