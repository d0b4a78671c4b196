"""Devices from names and addresses."""

from pathlib import Path

import pytest

from toolkit.device import resolve_device
from toolkit.errors import SettingsError

DEVICES = """
kitchen:
  host: 192.168.1.40
  user: pi
  target: raspberry-pi-5
  host_key: "SHA256:tYa1RCM4AMsbQCGXUADiCB7s0hUQ73+R00ihSW/H088"
orin:
  host: orin.lan
  port: 2222
  python: /opt/venv/bin/python
  root: /data/phiship
"""


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("pi@raspberrypi.local", "pi", "raspberrypi.local", 22),
        ("10.0.0.2:2222", "", "10.0.0.2", 2222),
        ("[::1]:2200", "", "::1", 2200),
        ("pi@[fe80::1%eth0]", "pi", "fe80::1%eth0", 22),
    ],
)
def test_addresses(text: str, user: str, host: str, port: int) -> None:
    device = resolve_device(text)
    assert (device.user, device.host, device.port) == (user, host, port)


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=id", "a b", "host:", "host:99999", "fe80::1", "u@", "@h", "a@b@c"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(SettingsError, match="allowed"):
        resolve_device(text)


def test_names_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(DEVICES)
    kitchen, orin = resolve_device("kitchen", path), resolve_device("orin", path)
    assert kitchen.address == "pi@192.168.1.40"
    assert kitchen.target == "raspberry-pi-5"
    assert kitchen.root == "~/.phiship"
    assert orin.address == "orin.lan:2222"
    assert (orin.python, orin.root) == ("/opt/venv/bin/python", "/data/phiship")
    with pytest.raises(SettingsError, match="kitchen, orin"):
        resolve_device("kitchn:", path)


def test_places_of_the_file(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [own_home / ".config" / "phiship", tmp_path, tmp_path / "named"]
    for number, folder in enumerate(places, 1):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "devices.yaml").write_text(f"board: {{host: host{number}}}\n")
        if folder.name == "named":
            monkeypatch.setenv("PHISHIP_DEVICES", str(folder / "devices.yaml"))
        assert resolve_device("board").host == f"host{number}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("port: 70000", ("board.port", "70000")),
        ("usr: pi", ("usr",)),
        ("host_key: MD5:aa", ("host_key", "MD5:aa")),
        ("user: [pi]", ("user",)),
    ],
)
def test_errors_name_line_and_key(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(f"board:\n  host: a\n  {line}\n")
    with pytest.raises(SettingsError) as caught:
        resolve_device("board", path)
    assert f"{path}:3:" in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        resolve_device("board", tmp_path / "none.yaml")


def test_embedded_needs_no_file() -> None:
    assert resolve_device("embedded").is_embedded
