"""Key files: what is written, who may read it, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zrl.errors import ConfigError
from zrl.net import keys as k


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A learner's, with its pair."""
    k.new_pair(tmp_path / "keys", "server")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def public() -> str:
    return k.draw().public.decode()


def test_a_pair(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "keys"
    key = k.new_pair(folder, "one")
    assert (folder / "one.public").read_text() == key + "\n"
    assert [mode(folder), mode(folder / "one.secret")] == [0o700, 0o600]
    assert sorted(os.listdir(folder)) == ["one.public", "one.secret"]
    k.authorize(folder, "server", public())
    keys = k.host_keys(folder)
    assert keys.pair.public.decode() == key
    assert keys.path == folder / "one"
    assert keys.pair.secret.decode() not in repr(keys)
    assert k.host_keys_at(keys.path) == keys


def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / "server.secret").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        k.new_pair(folder, "server")
    assert (folder / "server.secret").read_bytes() == before
    (folder / "one.public").write_text(public())
    with pytest.raises(ConfigError, match=r"one\.public: is there already"):
        k.new_pair(folder, "one")
    assert not (folder / "one.secret").exists()


@pytest.mark.parametrize("name", ["", "server", "../x", ".x", "-x", "a/b", "a\n", "é", "x" * 65])
def test_names_that_are_none(folder: Path, name: str) -> None:
    for call in (
        lambda: k.authorize(folder, name, public()) if name != "server" else k.check_name(name),
        lambda: k.revoke(folder, name),
        lambda: k.new_pair(folder, name),
    ):
        with pytest.raises(ConfigError, match=r"NAME: expected|is there already"):
            call()


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o660])
def test_a_secret_that_others_can_read(folder: Path, loose: int) -> None:
    (folder / "server.secret").chmod(loose)
    with pytest.raises(ConfigError, match=f"server.secret: expected a file of yours with mode 0600, found {loose:04o}"):
        k.learner_keys(folder)


def test_a_folder_that_others_can_use(folder: Path) -> None:
    folder.chmod(0o750)
    for call in (lambda: k.learner_keys(folder), lambda: k.authorize(folder, "a", public()), lambda: k.entries(folder)):
        with pytest.raises(ConfigError, match="mode 0700, found 0750"):
            call()


def test_a_secret_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "server.secret").rename(tmp_path / "elsewhere")
    (folder / "server.secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        k.learner_keys(folder)


@pytest.mark.parametrize("text", ["", "x" * 39, "x" * 41, "~" * 40, "'" * 40])
def test_what_is_no_key(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="PUBLIC: expected a key of 40 characters"):
        k.authorize(folder, "one", text)
    (folder / "server.secret").write_text(text)
    with pytest.raises(ConfigError, match=r"server.secret: expected (a key of 40|one line)") as caught:
        k.learner_keys(folder)
    assert not text or text not in str(caught.value)


def test_a_pair_whose_halves_do_not_fit(folder: Path) -> None:
    (folder / "server.public").write_text(public())
    with pytest.raises(ConfigError, match=r"not the public key of server\.secret"):
        k.learner_keys(folder)


@pytest.mark.parametrize(
    ("names", "text"), [([], "no pair of a host"), (["a", "b"], "found a, b"), (["a"], "which learner to trust")]
)
def test_what_a_host_lacks(tmp_path: Path, names: list[str], text: str) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    for name in names:
        k.new_pair(folder, name)
    with pytest.raises(ConfigError, match=text):
        k.host_keys(folder)


@pytest.mark.parametrize("read", [k.learner_keys, k.host_keys, k.entries])
def test_no_folder(tmp_path: Path, read: object) -> None:
    with pytest.raises(ConfigError, match="no folder with keys"):
        read(tmp_path / "nowhere")  # type: ignore[operator]


def test_a_learner_without_its_pair(tmp_path: Path) -> None:
    k.new_pair(tmp_path / "keys", "one")
    with pytest.raises(ConfigError, match="zrl keys new --server"):
        k.learner_keys(tmp_path / "keys")


def test_authorize_and_revoke(folder: Path) -> None:
    key, other = public(), public()
    k.authorize(folder, "one", key)
    k.authorize(folder, "one", key)  # again: nothing to do
    for name, clash in (("one", other), ("two", key)):
        with pytest.raises(ConfigError, match="revoke that first: zrl keys revoke one"):
            k.authorize(folder, name, clash)
    assert k.revoke(folder, "one") == key
    with pytest.raises(ConfigError, match=r"one: not authorized in .*; there are: none"):
        k.revoke(folder, "one")
    with pytest.raises(ConfigError, match=r"this key was revoked \(of one\)"):
        k.authorize(folder, "two", key)
    k.authorize(folder, "one", other)
    k.revoke(folder, "one")
    states = [(entry.name, entry.state, entry.public) for entry in k.entries(folder)]
    assert states[0][:2] == ("server", "own")
    assert states[1:] == [("one", "revoked", key), ("one", "revoked", other)]


def test_the_learner_to_trust(tmp_path: Path, folder: Path) -> None:
    key = public()
    k.authorize(tmp_path / "host", "server", key)
    k.authorize(tmp_path / "host", "server", key)
    assert k.entries(tmp_path / "host") == [k.Entry("server", "learner", key)]
    with pytest.raises(ConfigError, match="another learner is trusted already"):
        k.authorize(tmp_path / "host", "server", public())
    with pytest.raises(ConfigError, match="own learner"):
        k.authorize(folder, "server", key)


def test_a_file_that_is_nobodys(folder: Path) -> None:
    """Put there by hand, under a name that would be no user id."""
    (folder / "authorized").mkdir()
    Path(os.fsdecode(bytes(folder) + b"/authorized/\xff.public")).write_text(public())
    with pytest.raises(ConfigError, match="NAME: expected"):
        k.Authorized(folder)


def test_changes_count_at_once(folder: Path) -> None:
    """However fast one follows another: the time of change of a folder need not differ."""
    who = k.Authorized(folder)
    for _ in range(5):
        key = public()
        assert who.user_of(key.encode()) == ""
        k.authorize(folder, "one", key)
        assert who.user_of(key.encode()) == f"one {key}"
        k.revoke(folder, "one")
        assert who.user_of(key.encode()) == ""
        assert who.is_revoked(key.encode())


def test_what_does_not_change_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    k.authorize(folder, "one", public())
    monkeypatch.setattr(k, "UNSETTLED", -1.0)
    who = k.Authorized(folder)

    def read(folder: Path) -> list[k.Entry]:
        raise ConfigError("it is read")

    monkeypatch.setattr(k, "entries", read)
    assert who.user_of(b"x" * 40) == ""
    assert not caplog.records
    os.utime(folder / "authorized", (0, 0))
    who.user_of(b"x" * 40)
    assert "it is read" in caplog.text
