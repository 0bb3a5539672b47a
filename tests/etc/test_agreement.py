"""README, the sample configuration and main.cf.example say the same, and mail flows by each of their lines.

The lines are taken out of each and given to a Postfix whose smtpd(8) and cleanup(8) are chrooted, and the server is
the sample's; only addresses are led to those of this test.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.installation import Installation
from tests.integration.postfix import Postfix

README = Path(__file__).parent.parent.parent / "README.md"
UNIX_LISTEN = re.compile(r'^#?\s*(listen = .*"unix:/var/spool/postfix/.*)$', re.MULTILINE)


def parameters(text: str) -> dict[str, str]:
    """Return the parameters of main.cf in *text*; postconf(5) has the rules for lines that go on."""
    logical = re.sub(r"\n[ \t]+", " ", text)
    return dict(re.findall(r"^(\w+) = (.*)$", logical, flags=re.MULTILINE))


def readme_blocks() -> list[dict[str, str]]:
    section = README.read_text().partition("\n## In Postfix\n")[2].partition("\n## ")[0]
    return [parameters(block) for block in re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)]


def example_blocks(etc: Path) -> list[dict[str, str]]:
    """Return the paragraphs of main.cf.example, with their comment signs taken off."""
    text = (etc / "postfix/main.cf.example").read_text()
    paragraphs = [re.sub(r"^#(?=\w+ =|    )", "", each, flags=re.MULTILINE) for each in text.split("\n\n")]
    # Prose, but for the parameters.
    return [found for each in paragraphs if (found := parameters(re.sub(r"^#.*\n?", "", each, flags=re.MULTILINE)))]


@pytest.fixture
def postfix(installation: Installation, etc: Path) -> Iterator[Postfix]:
    """A chrooted Postfix, not started; the sample's server runs, and listens in its queue directory, too."""
    with Postfix({"disable_dns_lookups": "yes"}, chroot=True) as postfix:
        (postfix.queue_directory / "socketmap").mkdir(mode=0o750)
        shutil.chown(postfix.queue_directory / "socketmap", 0, "postfix")
        for name in ("sample.aliases", "sample.py"):
            shutil.copy(etc / name, installation.directory)
        text = (etc / "prefork-socketmap.toml").read_text()
        (listen,) = UNIX_LISTEN.findall(text)
        text = re.sub(r"^listen = .*$", listen, text, flags=re.MULTILINE)
        text = text.replace('#runtime_dir = "/run/prefork-socketmap"', 'runtime_dir = "run"')
        text = with_srs(text)
        (installation.directory / "srs.secret").write_text("secret\n")
        (installation.directory / "srs.secret").chmod(0o640)
        installation.config.write_text(led(text, installation, postfix))
        installation.start()
        yield postfix
        print(postfix.log())


def with_srs(text: str) -> str:
    """Return *text*, the sample, with its maps of the type ``srs`` switched on."""
    plain, comment, srs = text.partition("#[maps.srs-forward]")
    assert comment
    switched_on = re.sub("^#", "", comment + srs, flags=re.MULTILINE)
    return plain + switched_on.replace("/etc/prefork-socketmap/srs.secret", "srs.secret")


def led(text: str, installation: Installation, postfix: Postfix) -> str:
    """Return *text* with this test's port and queue directory."""
    return text.replace(":27823", f":{installation.port}").replace("/var/spool/postfix", str(postfix.queue_directory))


def blocks() -> list[dict[str, str]]:
    etc = README.parent / "etc"
    return [*readme_blocks(), *example_blocks(etc)]


def name_of(block: dict[str, str]) -> str:
    return "+".join(block)


@pytest.mark.parametrize("block", blocks(), ids=name_of)
def test_mail_flows_by_the_lines(block: dict[str, str], installation: Installation, postfix: Postfix) -> None:
    # What a block does not say is static here, so that each is tried for itself.
    rest = {"virtual_mailbox_domains": "example.com example.org example.net"}
    postfix.set(rest | {name: led(value, installation, postfix) for name, value in block.items()})
    postfix.start()
    with postfix.smtp() as session:
        session.ehlo()
        session.mail("sender@client.example.test")
        queue_id = session.deliver("info@example.com")
    # Where aliases are not asked for, the address stays as it was.
    final = "alice" if "virtual_alias_maps" in block else "info"
    assert "status=sent" in postfix.logged(queue_id, f"to=<{final}@example.com>", "status=")
    with postfix.transaction() as session:
        assert session.try_recipient("somebody@elsewhere.test")[0] == 554
        if "smtpd_recipient_restrictions" in block:
            assert session.try_recipient("former@example.com") == (
                554,
                "5.7.1 <former@example.com>: Recipient address rejected: this person has left",
            )
    if "sender_canonical_maps" in block:
        rewritten = re.search(r"from=<(SRS0=\S+=sender@srs\.example\.com)>", postfix.logged(queue_id, "from=<"))
        assert rewritten
        with postfix.transaction() as session:
            assert session.try_recipient(rewritten[1].replace("sender", "forged"))[0] == 550
            assert session.try_recipient(rewritten[1])[0] in (250, 554)
    if "transport_maps" in block:
        with postfix.transaction() as session:
            queue_id = session.deliver("anybody@example.net")
        assert "mail.example.net" in postfix.logged(queue_id, "to=<anybody@example.net>", "status=deferred")


def test_the_blocks_are_found_and_name_maps_over_each_kind_of_socket(etc: Path) -> None:
    assert len(readme_blocks()) == 2
    assert len(example_blocks(etc)) == 4
    values = " ".join(value for block in blocks() for value in block.values())
    maps = set(re.findall(r"socketmap:(?:inet:[\d.:]+|unix:[^:]+):([\w-]+)", values))
    assert maps == {"domains", "aliases", "transport", "access", "srs-forward", "srs-reverse"}
    assert "socketmap:unix:socketmap/sock:" in values


def test_the_line_for_the_unix_socket_is_the_same_everywhere(etc: Path) -> None:
    texts = [README, etc / "prefork-socketmap.toml", etc / "postfix/main.cf.example"]
    (line,) = {line for path in texts for line in UNIX_LISTEN.findall(path.read_text())}
    assert all(UNIX_LISTEN.findall(path.read_text()) == [line] for path in texts)
    # And it is what the socket unit opens.
    opened = re.findall(r"^ListenStream=(.*)$", (etc / "systemd/prefork-socketmap.socket").read_text(), re.MULTILINE)
    assert re.findall(r'"(?:inet|unix):([^"]*)"', line) == opened
