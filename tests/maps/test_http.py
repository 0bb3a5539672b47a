"""The type ``http``, against a small real server, whose answers ``http_program`` tells."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps.base import Map
from prefork_socketmap.settings import SettingError
from prefork_socketmap.socketmap.messages import Reply, Status
from tests.integration.servers.httpd import Httpd
from tests.integration.servers.process import Certificate
from tests.maps.opening import OpenMap

Make = Callable[..., Map]


@pytest.fixture
def make(open_map: OpenMap, httpd: Httpd) -> Make:
    """Return a maker of maps from the URL's path and the settings."""

    def make(path: str = "/alias/%s", **table: object) -> Map:
        return open_map("http", url=f"http://127.0.0.1:{httpd.port}{path}", **table)

    return make


@pytest.mark.parametrize(
    ("path", "key", "reply"),
    [
        ("/alias/%s", "info@example.com", Reply.ok("staff@example.net")),
        ("/alias/%s", "INFO@example.com", Reply.ok("staff@example.net")),
        ("/alias/%u@%d", "info@example.com", Reply.ok("staff@example.net")),
        ("/alias/%s", "missing", Reply.not_found()),
        ("/alias/%s", "two words", Reply.ok("2")),
        ("/body?text=%s", "müller+x&y=z@example.com", Reply.ok("müller+x&y=z@example.com")),
        ("/body?text=%u%%20at%%20%d", "info@example.com", Reply.ok("info at example.com")),
        ("/body?text=a%%0Ab%%0A", "x", Reply.ok("a,b")),
        ("/body?text=%%20", "x", Reply.not_found()),
        ("/body", "x", Reply.not_found()),
        ("/alias/%s", "\udcff", Reply.not_found()),
    ],
)
def test_the_body_answers(make: Make, path: str, key: str, reply: Reply) -> None:
    assert make(path).lookup(key) == reply


def test_an_empty_body_is_not_found_with_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make("/body").lookup("x") == Reply.not_found()
    assert "'x' has an empty value" in caplog.text


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (204, Status.TEMP),
        (302, Status.PERM),
        (400, Status.PERM),
        (401, Status.PERM),
        (404, Status.NOT_FOUND),
        (410, Status.PERM),
        (500, Status.TEMP),
        (503, Status.TEMP),
    ],
)
def test_the_status_decides(make: Make, code: int, status: Status) -> None:
    assert make("/status/%s").lookup(str(code)).status is status


def test_a_failure_tells_its_status(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make("/status/%s").lookup("503") == Reply.temp_fail("map m: the server answered with HTTP status 503")
    assert "HTTP status 503" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "../status/200",
        "..",
        ".",
        "x/../info@example.com",
        "x?text=secret",
        "x#secret",
        "x HTTP/1.1\r\nX-Header: 1",
        "%2e%2e",
        "//127.0.0.1:1/",
        "x;y=z",
    ],
)
@pytest.mark.parametrize("path", ["/alias/%s", "/alias/%s/", "/alias/%u?x=%s"])
def test_a_key_cannot_change_the_path(make: Make, path: str, key: str) -> None:
    assert make(path).lookup(key) == Reply.not_found()


def test_a_slash_in_a_key_stays_in_its_segment(make: Make) -> None:
    assert make().lookup("a/b") == Reply.ok("slash")


def test_a_key_cannot_add_a_parameter(make: Make) -> None:
    assert make("/body?text=%s").lookup("x&text=y#z") == Reply.ok("x&text=y#z")


def test_a_catch_all_works(make: Make) -> None:
    assert make("/body?text=%d", search="address").lookup("anybody@example.org") == Reply.ok("example.org")


def test_the_connection_is_kept(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = make("/status/%s")
    assert [table.lookup(code).status for code in ("404", "503", "404")] == [
        Status.NOT_FOUND,
        Status.TEMP,
        Status.NOT_FOUND,
    ]
    assert caplog.text.count("connected to") == 1


def test_a_connection_that_the_server_closed_is_replaced_within_the_lookup(make: Make) -> None:
    table = make("/once?text=%s")
    assert [table.lookup(key) for key in "abc"] == [Reply.ok(key) for key in "abc"]


def test_headers_are_sent(make: Make) -> None:
    assert make("/header/x-tenant?%s", headers={"X-Tenant": "mail"}).lookup("x") == Reply.ok("mail")


@pytest.mark.parametrize("source", ["token", "token_file", "token_env"])
def test_a_bearer_token_is_sent(make: Make, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("the-token\n")
    monkeypatch.setenv("THE_TOKEN", "the-token")
    value = {"token": "the-token", "token_file": "token", "token_env": "THE_TOKEN"}[source]
    assert make("/header/authorization?%s", **{source: value}).lookup("x") == Reply.ok("Bearer the-token")


def test_a_token_that_no_header_can_have_is_not_shown(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_text("hunter2\nhunter3\n")
    assert make(token_file="token").lookup("x") == Reply.temp_fail("map m: the token is not printable ASCII")
    assert "hunter" not in caplog.text


def test_a_body_that_is_too_large_is_a_temporary_failure(make: Make) -> None:
    table = make("/large?%s")
    assert table.lookup("x") == Reply.temp_fail("map m: the reply is too large")
    assert table.lookup("x") == Reply.temp_fail("map m: the reply is too large")


def test_tls_is_verified(open_map: OpenMap, httpd: Httpd, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(httpd.tls.certificate.read_bytes())
    other = str(Certificate(tmp_path, "root").certificate)

    def lookup(**table: object) -> Reply:
        url = f"https://127.0.0.1:{httpd.tls_port}/alias/%s"
        return open_map("http", url=url, **table).lookup("info@example.com")

    assert lookup(tls_CAfile="ca.pem") == Reply.ok("staff@example.net")
    assert lookup() == Reply.temp_fail("map m: the backend is not available")
    assert lookup(tls_CAfile=other) == Reply.temp_fail("map m: the backend is not available")
    assert lookup(tls_verify_cert=False) == Reply.ok("staff@example.net")


def test_no_error_and_no_log_line_has_a_secret(
    open_map: OpenMap, httpd: Httpd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    table = open_map(
        "http", url=f"http://127.0.0.1:{httpd.port}/status/%s", token="hunter2", headers={"X-Key": "hunter3"}
    )
    replies = [table.lookup("401"), table.lookup("503")]
    httpd.stop()
    replies.append(table.lookup("404"))
    assert "hunter" not in caplog.text + repr(replies) + repr(table)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"url": "ftp://host/%s"}, r"maps\.m\.url: 'ftp://host/%s' is no URL"),
        ({"url": "http:///%s"}, r"maps\.m\.url: 'http:///%s' is no URL"),
        ({"url": "http://%d/"}, r"maps\.m\.url: the host can have no part of the key"),
        ({"url": "http://u:hunter2@host/%s"}, r"maps\.m\.url: the host can have no part of the key and no password"),
        ({"hosts": ["unix:/run/http"]}, r"maps\.m\.hosts: 'unix:/run/http' is not accepted here"),
        ({"url": "http://host:port/%s"}, r"maps\.m\.url: 'host:port' is not accepted"),
        ({"url": "http://host/%20%s"}, r"maps\.m\.url: .* write %%20 to get %20"),
        ({"url": "http://host/%s", "tls_CAfile": "x"}, r"maps\.m\.url: does not begin with https://"),
        ({"token": "hunter2", "token_file": "x"}, r"maps\.m\.token: only one of token, token_file and token_env"),
        ({"headers": {"X-Key": 12345}}, r"maps\.m\.headers\.X-Key: expected a string that is not empty"),
        ({"headers": {"X-Key": "hunter2\r\n"}}, r"maps\.m\.headers\.X-Key: has a character that no header may have"),
        ({"headers": {"X Key": "x"}}, r"maps\.m\.headers\.X Key: is no name of a header"),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error) as caught:
        open_map("http", **{"url": "http://host/%s", **table})
    assert "hunter2" not in str(caught.value)
    assert "12345" not in str(caught.value)
