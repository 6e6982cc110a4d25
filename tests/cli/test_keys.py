"""``zrl keys``, and ``--keys`` where a file will not do."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from zrl.cli import main
from zrl.net.keys import draw
from zrl.net.sockets import bind, make_context, make_pub, secure


def zrl(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def last(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1]


def test_from_pair_to_revoked(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert "zrl keys authorize server '" in last(zrl("keys", "new", "--server", "--keys", a))
    made = zrl("keys", "new", "one", "--keys", b)
    key = (b / "one.public").read_text().strip()
    assert last(made) == f"on the learner's machine: zrl keys authorize one '{key}' --keys DIR"
    assert (b / "one.secret").read_text().strip() not in made.output
    last(zrl("keys", "authorize", "server", a / "server.public", "--keys", b))
    assert last(zrl("keys", "authorize", "one", key, "--keys", a)) == f"one is authorized in {a}"
    assert last(zrl("keys", "list", "--keys", a)) == f"authorized  one     {key}"
    assert last(zrl("keys", "revoke", "one", "--keys", a)) == f"revoked one: {key}"
    assert last(zrl("keys", "list", "--keys", a)) == f"revoked     one     {key}"
    learner = (a / "server.public").read_text().strip()
    assert zrl("keys", "list", "--keys", b).output.splitlines() == [
        f"own         one     {key}",
        f"learner     server  {learner}",
    ]


def test_the_machine_gives_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "mine.x y")
    last(zrl("keys", "new", "--keys", tmp_path / "a"))
    assert (tmp_path / "a" / "mine.x-y.secret").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["keys", "new", "one", "--server"], "NAME: the learner's pair has none"),
        (["keys", "new", "../one"], "NAME: expected"),
        (["keys", "new", "server"], "and not 'server', which is the learner"),
        (["keys", "authorize", "one", "nonsense"], "PUBLIC: expected a key of 40 characters of Z85, found 8"),
        (["keys", "revoke", "one"], "no folder with keys"),
        (["keys", "list"], "no folder with keys"),
        (["worker", "--connect", "tcp://127.0.0.1:1"], "no folder with keys"),
        (["status", "tcp://127.0.0.1:1"], "--keys: "),
        (["top", "tcp://127.0.0.1:1"], "--keys: "),
    ],
)
def test_what_is_refused(tmp_path: Path, words: list[str], text: str) -> None:
    done = zrl(*words, "--keys", tmp_path / "none")
    assert (done.exit_code, text in done.output) == (2, True), done.output


def test_a_secret_is_never_taken_for_a_public_key(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    last(zrl("keys", "new", "--server", "--keys", a))
    last(zrl("keys", "new", "one", "--keys", b))
    done = zrl("keys", "authorize", "one", b / "one.secret", "--keys", a)
    assert done.exit_code == 2
    assert "that is a secret; its public key is in one.public" in done.output
    assert (b / "one.secret").read_text().strip() not in zrl("keys", "list", "--keys", a).output


def test_a_key_file_that_is_too_open(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    last(zrl("keys", "new", "one", "--keys", folder))
    last(zrl("keys", "authorize", "server", folder / "one.public", "--keys", folder))
    (folder / "one.secret").chmod(0o644)
    done = zrl("worker", "--connect", "tcp://127.0.0.1:1", "--keys", folder)
    assert done.exit_code == 2
    assert "one.secret: expected a file of yours with mode 0600, found 0644" in done.output


def test_looking_on_without_a_key() -> None:
    context = make_context()
    pub = make_pub(context)
    secure(pub, draw())
    port = int(bind(pub, "tcp://127.0.0.1:*").rpartition(":")[2])
    try:
        done = zrl("status", f"tcp://127.0.0.1:{port - 1}", "--timeout", "2")
    finally:
        pub.close()
        context.term()
    assert done.exit_code == 3, done.output
    assert f"the learner at tcp://127.0.0.1:{port} refused the handshake: it wants keys (--keys DIR)" in done.output


def test_another_machine_only_with_keys(tmp_path: Path) -> None:
    done = zrl("worker", "--connect", "tcp://192.0.2.1:5555")
    assert (done.exit_code, "--insecure to go without" in done.output) == (2, True)
