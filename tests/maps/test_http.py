"""The type ``http``, against a small real server, whose answers ``http_program`` tells."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork_socketmap.maps import httpanswer
from prefork_socketmap.maps.backend import LONGEST_LEAVE
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
        (404, Status.TEMP),
        (408, Status.TEMP),
        (410, Status.PERM),
        (425, Status.TEMP),
        (429, Status.TEMP),
        (500, Status.TEMP),
        (503, Status.TEMP),
    ],
)
def test_the_status_decides(make: Make, code: int, status: Status) -> None:
    assert make("/status/%s").lookup(str(code)).status is status


def test_a_failure_tells_its_status(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make("/status/%s").lookup("503") == Reply.temp_fail("map m: the server answered with HTTP status 503")
    assert "HTTP status 503" in caplog.text


LOGIN_PAGE = "<html>log in</html>"


def test_a_login_page_is_no_answer(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert make("/body?text=%s&type=text/html").lookup(LOGIN_PAGE) == Reply.temp_fail(
        "map m: the answer has the content type 'text/html'"
    )
    assert "'text/html'" in caplog.text
    assert make("/body?text=%s&type=garbage").lookup("x").status is Status.TEMP
    assert make("/untyped?%s").lookup("x") == Reply.temp_fail("map m: the answer has the content type 'none'")


@pytest.mark.parametrize("accepted", ["text/html", "text/*", "*/*", "Text/HTML"])
def test_other_content_types_can_be_accepted(make: Make, accepted: str) -> None:
    table = make("/body?text=%s&type=text/html;%%20charset=UTF-8", content_type=[accepted])
    assert table.lookup("found") == Reply.ok("found")


def test_an_answer_without_a_content_type_can_be_accepted(make: Make) -> None:
    assert make("/untyped?%s", content_type=["*/*"]).lookup("x") == Reply.ok("text")


def test_the_server_is_told_which_content_types_are_accepted(make: Make) -> None:
    assert make("/header/accept?%s").lookup("x") == Reply.ok("text/plain, application/json")
    assert make("/header/accept?%s", headers={"accept": "text/plain"}).lookup("x") == Reply.ok("text/plain")


def test_a_body_is_decoded_as_its_charset_says(make: Make) -> None:
    # The server sends UTF-8 whatever it says; read as Latin-1 each byte is a character.
    assert make("/body?text=%s&type=text/plain;charset=latin-1").lookup("ü") == Reply.ok("Ã¼")
    assert make("/body?text=%s&type=text/plain;charset=klingon").lookup("x") == Reply.temp_fail(
        "map m: the character set 'klingon' is not known here"
    )


NESTED = "[" * 20_000
TEMP_JSON = Reply.temp_fail("map m: the body is no JSON")
TEMP_FORM = Reply.temp_fail("map m: the JSON has a table or a list where a text is expected; see the setting result")


@pytest.mark.parametrize(
    ("result", "text", "reply"),
    [
        (None, '"a@host.test"', Reply.ok("a@host.test")),
        (None, '["a", "b"]', Reply.ok("a,b")),
        (None, "42", Reply.ok("42")),
        (None, "1.50", Reply.ok("1.50")),
        (None, "9" * 5000, Reply.ok("9" * 5000)),
        (None, "true", Reply.ok("true")),
        (None, "false", Reply.not_found()),
        (None, "null", Reply.not_found()),
        (None, "[]", Reply.not_found()),
        (None, '{"error": "log in"}', TEMP_FORM),
        (None, "a@host.test", TEMP_JSON),
        (None, NESTED, TEMP_JSON),
        (None, '"\\ud800"', Reply.temp_fail("map m: the JSON has half a character")),
        (None, '"\\ud83d\\ude00"', Reply.ok("\U0001f600")),
        ("9" * 5000, "[]", Reply.temp_fail("map m: the JSON has no '9999999999...' of '9999999999...'")),
        ("data.0.address", '{"data": [{"address": "a"}, {"address": "b"}]}', Reply.ok("a")),
        ("data.1.address", '{"data": [{"address": "a"}, {"address": "b"}]}', Reply.ok("b")),
        ("data.0.address", '{"data": []}', Reply.not_found()),
        ("data.0.address", '{"data": null}', Reply.not_found()),
        ("data.0.address", '{"data": [{"address": null}]}', Reply.not_found()),
        ("data.0.address", '{"data": [{"address": ["a", "b"]}]}', Reply.ok("a,b")),
        ("data.0.address", "{}", Reply.temp_fail("map m: the JSON has no 'data' of 'data.0.address'")),
        ("data.0.address", '{"data": {}}', Reply.temp_fail("map m: the JSON has no '0' of 'data.0.address'")),
        ("data.0.address", '"text"', Reply.temp_fail("map m: the JSON has no 'data' of 'data.0.address'")),
        ("data", '{"data": {"address": "a"}}', TEMP_FORM),
        ("data", '{"data": [["a"]]}', TEMP_FORM),
    ],
)
def test_json_answers(make: Make, result: str | None, text: str, reply: Reply) -> None:
    setting = {} if result is None else {"result": result}
    assert make("/json?text=%s", fold=False, **setting).lookup(text) == reply


def test_with_a_path_every_accepted_body_is_json(make: Make) -> None:
    assert make("/body?text=%s", result="a").lookup('{"a": "b"}') == Reply.ok("b")
    assert make("/body?text=%s", result="a").lookup("b") == TEMP_JSON


def test_a_404_is_not_found_only_if_it_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    wrong_route = make("/no/such/route/%s").lookup("info@example.com")
    assert wrong_route.status is Status.TEMP
    assert "does not say that it is the key" in caplog.text
    assert make("/absent/NOTFOUND?%s").lookup("x") == Reply.not_found()
    assert make("/absent/other?%s").lookup("x").status is Status.TEMP
    assert make("/body?status=404&text=%s", fold=False).lookup("NOTFOUND\r\n") == Reply.not_found()
    assert make('/body?status=404&text="%s"', fold=False).lookup("NOTFOUND") == Reply.not_found()


def test_which_statuses_mean_not_found_can_be_told(make: Make) -> None:
    table = make("/status/%s", not_found_status=[204, 404, 410])
    assert [table.lookup(code).status for code in ("204", "404", "410")] == [Status.NOT_FOUND] * 3
    assert table.lookup("400").status is Status.PERM


@pytest.mark.parametrize("code", [408, 425, 429, 503])
def test_retry_after_is_honoured(make: Make, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    table = make("/later/%s?after=30")
    begin = time.monotonic()
    assert table.lookup(str(code)) == Reply.temp_fail(f"map m: the server answered with HTTP status {code}")
    assert table.lookup("200") == Reply.temp_fail("map m: the backend is not available")
    monkeypatch.setattr(time, "monotonic", lambda: begin + 40)
    assert table.lookup("200") == Reply.ok("wait")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("soon", 0),
        ("-5", 0),
        ("7", 7),
        ("9" * 100, 999_999_999),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015", 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float) -> None:
    assert httpanswer.retry_after(header) == seconds


def test_a_date_that_is_to_come_is_waited_for() -> None:
    assert 90 < httpanswer.retry_after(email.utils.formatdate(time.time() + 100, usegmt=True)) <= 100


def test_a_server_cannot_silence_the_map_for_long(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make("/later/%s?after=86400")
    table.lookup("429")
    later = time.monotonic() + LONGEST_LEAVE + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert table.lookup("200") == Reply.ok("wait")


BROKEN = Reply.temp_fail("map m: the backend is not available")


@pytest.mark.parametrize("bad", ["bad", "half"])
def test_a_key_that_makes_the_server_hang_up_fails_alone(make: Make, bad: str) -> None:
    table = make("/echo/%s")
    for number in range(20):
        assert table.lookup(bad) == BROKEN
        assert table.lookup(f"good{number}") == Reply.ok(f"good{number}")
    assert [table.lookup(bad) for _ in range(5)] == [BROKEN] * 5
    assert table.lookup("good") == Reply.ok("good")


def test_a_server_that_hangs_up_on_one_key_after_the_other_is_left_alone(make: Make) -> None:
    table = make("/echo/%s")
    assert [table.lookup(key) for key in ("bad1", "bad2", "good")] == [BROKEN] * 3


def test_a_token_file_is_read_again_when_it_changes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    table = make("/header/authorization?%s", token_file="token")
    assert table.lookup("x") == Reply.ok("Bearer first")
    (tmp_path / "token").write_text("second\n")
    assert table.lookup("x") == Reply.ok("Bearer second")
    (tmp_path / "token").unlink()
    assert table.lookup("x") == Reply.temp_fail("map m: the token cannot be read: No such file or directory")
    (tmp_path / "token").write_text("third\n")
    assert table.lookup("x") == Reply.ok("Bearer third")


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
    assert [table.lookup(code).status for code in ("200", "503", "401")] == [Status.OK, Status.TEMP, Status.PERM]
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


def test_an_answer_that_may_be_cut_off_is_none(open_map: OpenMap, httpd: Httpd) -> None:
    url = f"https://127.0.0.1:{httpd.tls_port}/untold/%s"
    table = open_map("http", url=url, tls_CAfile=str(httpd.tls.certificate))
    assert table.lookup("whole") == Reply.ok("whole")
    assert table.lookup("cut") == Reply.temp_fail("map m: the backend is not available")


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
        ({"url": "ftp://host/%s"}, r"maps\.m\.url: 'ftp://host/...' is no URL"),
        ({"url": "http:///%s"}, r"maps\.m\.url: 'http://...' is no URL"),
        ({"url": "http://%d/"}, r"maps\.m\.url: the host can have no part of the key"),
        ({"url": "http://u:hunter2@host/%s"}, r"maps\.m\.url: the host can have no part of the key and no password"),
        ({"hosts": ["unix:/run/http"]}, r"maps\.m\.hosts: 'unix:/run/http' is not accepted here"),
        ({"url": "http://host:port/%s"}, r"maps\.m\.url: 'host:port' is not accepted"),
        ({"url": "http://host/%20%s"}, r"maps\.m\.url: .* write %%20 to get %20"),
        ({"url": "http://host/%s", "tls_CAfile": "x"}, r"maps\.m\.url: does not begin with https://"),
        ({"token": "hunter2", "token_file": "x"}, r"maps\.m\.token: only one of token, token_file and token_env"),
        ({"headers": {"X-Key": 12345}}, r"maps\.m\.headers\.X-Key: expected a string that is not empty"),
        ({"headers": {"X-Key": "hunter2\r\n"}}, r"maps\.m\.headers\.X-Key: has a character that no header may have"),
        ({"content_type": ["text"]}, r"maps\.m\.content_type: 'text' is not accepted here; expected media types"),
        ({"content_type": []}, r"maps\.m\.content_type: \[\] is not accepted here"),
        ({"result": "data..x"}, r"maps\.m\.result: 'data\.\.x' has an empty step"),
        ({"not_found_status": [200]}, r"maps\.m\.not_found_status: 200 is not accepted here"),
        ({"not_found_status": 404}, r"maps\.m\.not_found_status: 404 is not accepted here; expected a list"),
        ({"headers": {"X Key": "x"}}, r"maps\.m\.headers\.X Key: is no name of a header"),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_is(open_map: OpenMap, table: dict[str, object], error: str) -> None:
    with pytest.raises(SettingError, match=error) as caught:
        open_map("http", **{"url": "http://host/%s", **table})
    assert "hunter2" not in str(caught.value)
    assert "12345" not in str(caught.value)


def test_what_is_fixed_in_the_query_of_a_url_is_in_no_log(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "prefork_socketmap")
    assert make("/body?key=c4n4ry&text=%s&also=c4n4ry%%20").lookup("x y") == Reply.ok("x y")
    assert "GET /body?key=...&text=x%20y&also=..." in caplog.text
    assert "c4n4ry" not in caplog.text
