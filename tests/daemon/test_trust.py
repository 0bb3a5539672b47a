"""What others can write to is refused as root and warned of otherwise; so are secrets that everybody can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefork_socketmap.daemon import configfile, trust
from prefork_socketmap.daemon.configfile import Places
from prefork_socketmap.settings import SettingError
from tests.daemon.installation import Installation

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has files of several users")

NOBODY = 65534
STATIC = '[maps.m]\ntype = "static"\nentries = {}\n'
PYTHON = '[maps.m]\ntype = "python"\npath = ["code"]\nfunction = "package.module:f"\n'
PASSWORD = '[maps.m]\ntype = "redis"\nhosts = ["h"]\nquery = "GET %s"\npassword = "x"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file in a directory of its own, with the code that PYTHON names."""
    directory = tmp_path / "etc"
    (directory / "code" / "package").mkdir(parents=True)
    (directory / "code" / "package" / "__init__.py").touch()
    (directory / "code" / "package" / "module.py").write_text("raise RuntimeError('the code is not executed')\n")
    file = directory / "file.toml"
    file.write_text(STATIC)
    return file


def examine(file: Path) -> list[str]:
    return trust.examine(configfile.load(file))


def refused(file: Path) -> str:
    """Return why root refuses *file*, which anybody else is only warned of."""
    with pytest.raises(SettingError) as caught:
        examine(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: NOBODY)
        assert str(caught.value) in examine(file)
    return str(caught.value)


def test_what_only_root_can_write_to_is_silently_believed(config: Path) -> None:
    for maps in (STATIC, PYTHON):
        config.write_text(maps)
        assert examine(config) == []


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_a_config_file_that_others_can_write_to_is_refused(config: Path, mode: int) -> None:
    config.chmod(mode)
    assert refused(config) == f"{config}: others can write to {config}; chmod go-w {config}"


def test_a_config_file_that_a_group_can_write_to_is_refused_unless_it_is_roots(config: Path) -> None:
    config.chmod(0o660)
    assert examine(config) == []
    os.chown(config, 0, NOBODY)
    assert "chmod go-w" in refused(config)
    config.chmod(0o640)
    assert examine(config) == []


def test_a_config_file_of_another_user_is_refused(config: Path) -> None:
    os.chown(config, 1, 0)
    assert f"{config} belongs to user 1" in refused(config)


def test_a_config_file_of_the_user_who_runs_the_server_is_believed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(config, NOBODY, NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert examine(config) == []


def test_a_config_file_in_a_directory_that_others_can_write_to_is_refused(config: Path) -> None:
    config.parent.chmod(0o777)
    assert f"others can write to {config.parent};" in refused(config)


def test_a_sticky_directory_keeps_what_is_in_it(config: Path) -> None:
    config.parent.chmod(0o1777)
    assert examine(config) == []


def test_a_link_is_as_good_as_what_it_leads_through(config: Path, tmp_path: Path) -> None:
    weak = tmp_path / "weak"
    weak.mkdir()
    (weak / "link").symlink_to(config)
    (tmp_path / "link").symlink_to(weak / "link")
    assert examine(tmp_path / "link") == []
    weak.chmod(0o777)
    assert f"others can write to {weak};" in refused(tmp_path / "link")
    weak.chmod(0o1777)
    os.chown(weak / "link", 1, 1, follow_symlinks=False)
    assert f"{weak}/link belongs to user 1" in refused(tmp_path / "link")


@pytest.mark.parametrize("weak", ["code", "code/package", "code/package/__init__.py", "code/package/module.py"])
def test_code_of_a_map_that_others_can_write_to_is_refused(config: Path, weak: str) -> None:
    config.write_text(PYTHON)
    (config.parent / weak).chmod(0o777)
    reason = refused(config)
    assert reason.startswith(f"{config}: maps.m.")
    assert f"others can write to {config.parent / weak};" in reason


def test_a_sticky_directory_of_code_is_one_where_others_can_put_code(config: Path) -> None:
    config.write_text(PYTHON)
    (config.parent / "code").chmod(0o1777)
    assert "maps.m.path: others can write to" in refused(config)


def test_code_of_the_workers_user_is_believed_and_a_config_file_of_his_is_not(config: Path) -> None:
    config.write_text('user = "nobody"\n' + PYTHON)
    module = config.parent / "code" / "package" / "module.py"
    os.chown(module, NOBODY, NOBODY)
    assert examine(config) == []
    os.chown(config, NOBODY, NOBODY)
    with pytest.raises(SettingError, match="belongs to user"):
        examine(config)


def test_code_of_the_default_map_is_looked_at_too(config: Path) -> None:
    config.write_text(PYTHON.replace("maps.m", "default_map"))
    (config.parent / "code").chmod(0o777)
    assert refused(config).startswith(f"{config}: default_map.path: ")


@pytest.mark.parametrize("weak", ["secrets", "secrets/file"])
def test_secrets_of_signatures_that_others_can_write_to_are_refused(config: Path, weak: str) -> None:
    config.write_text('[maps.m]\ntype = "srs"\nsecret_file = "secrets/file"\n')
    (config.parent / "secrets").mkdir()
    (config.parent / "secrets" / "file").write_text("secret\n")
    assert examine(config) == []
    (config.parent / weak).chmod(0o777)
    reason = refused(config)
    assert reason.startswith(f"{config}: maps.m.secret_file: ")
    assert f"others can write to {config.parent / weak};" in reason


@pytest.mark.parametrize(
    "table",
    [
        'path = "code"',
        "path = [1]",
        'path = ["\\u0000"]\nfunction = "a\\u0000:f"',
        'function = "package.none:f"',
        "function = 1",
        'setup = ":"',
        "",
    ],
)
def test_a_table_that_is_wrong_is_left_to_those_who_read_it(config: Path, table: str) -> None:
    config.write_text(f'[maps.m]\ntype = "python"\n{table}\n')
    assert examine(config) == []


# Secrets. Everybody can enter an installation's directory.


@pytest.mark.parametrize(
    "key", ["password", "bind_pw", "token", "api_token", "client_secret", "headers", "table.password"]
)
def test_a_secret_that_everybody_can_read_is_a_warning_that_says_chmod(installation: Installation, key: str) -> None:
    installation.configure(maps=f'[maps.m]\ntype = "any"\n{key} = "x"\n')
    (warning,) = examine(installation.config)
    assert warning.endswith(f"chmod o= {installation.config}")
    installation.config.chmod(0o640)
    assert examine(installation.config) == []


def test_what_is_no_secret_or_in_a_closed_directory_may_have_any_mode(installation: Installation) -> None:
    installation.configure(maps='[maps.m]\ntype = "any"\npassword_file = "x"\npassword_env = "X"\n')
    assert examine(installation.config) == []
    installation.configure(maps=PASSWORD)
    installation.directory.chmod(0o700)
    assert examine(installation.config) == []


def test_check_start_and_reload_warn_of_a_secret_that_everybody_can_read(installation: Installation) -> None:
    installation.configure(maps=PASSWORD)
    result = installation.run("check", "--no-connect")
    assert result.returncode == 0
    assert f"warning: {installation.config}: everybody can read the secrets in it; chmod" in result.stderr
    installation.config.chmod(0o600)
    assert installation.run("check", "--no-connect").stderr == ""
    installation.start()
    assert "chmod" not in installation.log.read_text()
    installation.config.chmod(0o644)
    assert installation.run("reload").returncode == 0
    installation.logged("chmod o=")


def test_root_does_not_start_reload_or_ask_what_others_can_write_to(installation: Installation) -> None:
    installation.start()
    installation.config.chmod(0o666)
    for command in (["check"], ["reload"], ["query", "colours", "sky"]):
        result = installation.run(*command)
        assert result.returncode != 0
        assert f"chmod go-w {installation.config}" in result.stderr
    installation.logged("reload refused, generation 1 goes on")
    assert installation.lookup() == "blue"
    assert installation.run("stop").returncode == 0
    for arguments in ([], ["--daemon"]):
        result = installation.run("serve", *arguments)
        assert result.returncode == os.EX_CONFIG
        assert f"chmod go-w {installation.config}" in result.stderr


# Directories of the server's own files.


@pytest.mark.parametrize("key", ["runtime_dir", "pid_file"])
@pytest.mark.parametrize("writer", ["owner", "group", "others", "sticky"])
def test_root_does_not_keep_its_files_where_others_can_write(
    installation: Installation, key: str, writer: str
) -> None:
    weak = installation.directory / "weak"
    weak.mkdir()
    owner, group, mode = {
        "owner": (NOBODY, 0, 0o755),
        "group": (0, NOBODY, 0o775),
        "others": (0, 0, 0o777),
        "sticky": (0, 0, 0o1777),
    }[writer]
    os.chown(weak, owner, group)
    weak.chmod(mode)
    installation.configure('user = "nobody"\n' + ('pid_file = "weak/pid"\n' if key == "pid_file" else ""))
    if key == "runtime_dir":
        installation.config.write_text(installation.config.read_text().replace('"run"', '"weak"'))
    result = installation.run("serve")
    assert result.returncode == os.EX_CONFIG
    assert f"{key}: " in result.stderr
    assert f"{weak}" in result.stderr
    assert "root alone can write" in result.stderr
    assert list(weak.iterdir()) == []


def test_a_directory_below_one_that_others_can_write_to_is_no_place_for_roots_files(
    installation: Installation,
) -> None:
    weak = installation.directory / "weak"
    weak.mkdir()
    weak.chmod(0o777)
    installation.configure('pid_file = "weak/below/pid"\n')
    (weak / "below").mkdir()
    assert f"others can write to {weak};" in installation.run("serve").stderr


def test_who_is_not_root_keeps_files_where_he_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    places = Places(tmp_path, tmp_path / "pid", are_defaults=False)
    with pytest.raises(SettingError):
        trust.refuse_places(places)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    trust.refuse_places(places)


def test_a_check_by_root_says_nothing_of_a_server_that_may_be_another_users(installation: Installation) -> None:
    installation.runtime_dir.mkdir()
    os.chown(installation.runtime_dir, NOBODY, NOBODY)
    assert installation.run("check").returncode == 0


def test_an_upgrade_is_refused_when_others_can_write_to_the_directory_by_now(installation: Installation) -> None:
    installation.start()
    os.chown(installation.runtime_dir, NOBODY, NOBODY)
    result = installation.run("upgrade")
    assert result.returncode != 0
    assert f"{installation.runtime_dir} belongs to user {NOBODY}" in result.stderr
    assert installation.lookup() == "blue"


@pytest.mark.parametrize(
    ("owner", "group", "mode", "is_weak"),
    [
        (0, 0, 0o755, False),
        (0, 0, 0o1777, False),
        (0, 0, 0o777, True),
        (0, NOBODY, 0o770, True),
        (0, 0, 0o770, False),
        (NOBODY, 0, 0o750, True),
        (1, 0, 0o750, False),
    ],
)
def test_a_socket_that_the_workers_could_exchange_is_warned_of(
    config: Path, tmp_path: Path, owner: int, group: int, mode: int, *, is_weak: bool
) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    os.chown(directory, owner, group)
    directory.chmod(mode)
    config.write_text(f'user = "nobody"\nlisten = ["unix:{directory}/socket"]\n{STATIC}')
    warnings = examine(config)
    assert len(warnings) == is_weak
    assert all(warning.endswith(f"{directory}/socket; chown root {directory}") for warning in warnings)
