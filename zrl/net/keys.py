"""Key files: who a learner and a host are, and which hosts and observers a learner lets in.

    DIR/                       0700, yours
      server.secret            0600: the learner's; on its machine only
      server.public            the learner's; hosts and observers have a copy of this one, so as to know it
      NAME.secret, .public     the pair of a host (a `zrl worker`, or whoever looks on), one to a folder
      authorized/NAME.public   on the learner's machine: who may connect
      revoked/NAME.public      who may not any more, a key a line; it wins over ``authorized``

A file holds a key of 32 bytes as 40 characters of Z85, in one line that can be pasted (between single quotes, in a
shell). Secrets are read by the process that uses them; what is handed on to others is a path.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from zrl.errors import ConfigError

SERVER = "server"  # the name of the learner's pair
AUTHORIZED, REVOKED = "authorized", "revoked"
KEY_LENGTH = 40  # characters
LOOK_AGAIN = 0.1  # seconds between two looks at the folders
UNSETTLED = 1.0  # seconds in which a folder may change without another time of change

logger = logging.getLogger("zrl")

_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Pair:
    """A key pair; keys as 40 bytes of Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class HostKeys:
    """What a host or an observer connects with: its pair, and the key that the learner must have.

    Attributes:
        path: of the pair's files without their suffixes, DIR/NAME: `host_keys_at` reads them again.
    """

    path: Path
    pair: Pair
    server: bytes


@dataclass(frozen=True)
class LearnerKeys:
    """What a learner binds with: its pair, and the folder that says who may connect."""

    folder: Path
    pair: Pair


@dataclass(frozen=True)
class Entry:
    """A line of ``zrl keys list``; `state`: own, learner, authorized or revoked."""

    name: str
    state: str
    public: str


def draw() -> Pair:
    """A fresh pair. Its public key does not begin with a dash, so that it is no option on a command line."""
    while True:
        public, secret = zmq.curve_keypair()
        if not public.startswith(b"-"):
            return Pair(public, secret)


def new_pair(folder: Path, name: str) -> str:
    """Make the pair `name` in `folder`, which is made, too; its public key.

    Raises:
        ConfigError: a name that is none, a folder that others can use, or files that are there already.
    """
    if name != SERVER:
        check_name(name)
    _make_folder(folder)
    for file in (folder / f"{name}.secret", folder / f"{name}.public"):
        if file.exists():
            raise ConfigError(f"{file}: is there already; take another name or folder, or remove it first")
    pair = draw()
    _write(folder / f"{name}.secret", pair.secret, 0o600)
    _write(folder / f"{name}.public", pair.public, 0o644)
    return pair.public.decode()


def learner_keys(folder: Path) -> LearnerKeys:
    """The learner's keys.

    Raises:
        ConfigError: one is missing, or no key, or others can read it.
    """
    _check_folder(folder)
    secret = folder / f"{SERVER}.secret"
    if not secret.exists():
        raise ConfigError(f"{secret}: no such file; make the learner's keys: zrl keys new --server --keys {folder}")
    return LearnerKeys(folder, _load_pair(folder, SERVER))


def host_keys(folder: Path) -> HostKeys:
    """The keys of the host whose folder this is: its only pair besides the learner's.

    Raises:
        ConfigError: no pair or several, no key of the learner, one that is no key, or others can read it.
    """
    folder = folder.absolute()  # workers get this path
    _check_folder(folder)
    names = sorted(path.stem for path in folder.glob("*.secret") if path.stem != SERVER)
    if not names:
        raise ConfigError(f"{folder}: no pair of a host in it; make one: zrl keys new NAME --keys {folder}")
    if len(names) > 1:
        raise ConfigError(
            f"{folder}: expected the pair of one host, found {', '.join(names)}; give each its own folder"
        )
    return host_keys_at(folder / names[0])


def host_keys_at(path: Path) -> HostKeys:
    """The keys at `HostKeys.path`; raises as `host_keys` does."""
    folder = path.parent
    _check_folder(folder)
    server = folder / f"{SERVER}.public"
    if not server.exists():
        raise ConfigError(
            f"{server}: no such file; it says which learner to trust: zrl keys authorize server KEY --keys {folder}, "
            "where KEY is what the learner's machine has in its server.public"
        )
    return HostKeys(path, _load_pair(folder, path.name), read_public(server))


def authorize(folder: Path, name: str, public: str) -> None:
    """Let the holder of `public` in, as `name`. With the name ``server``: trust the learner with this key.

    Raises:
        ConfigError: no name, no key, a name or key that is somebody else's or was revoked.
    """
    key = key_of(public, "PUBLIC")
    _make_folder(folder)
    if name == SERVER:
        _trust(folder / f"{SERVER}.public", key)
        return
    check_name(name)
    _make_folder(folder / AUTHORIZED)
    for entry in entries(folder):
        if entry.state == REVOKED and entry.public == public:
            raise ConfigError(f"{public}: this key was revoked (of {entry.name}); make another pair: zrl keys new")
        if entry.state == AUTHORIZED and (entry.name == name) != (entry.public == public):
            raise ConfigError(
                f"{name}: {entry.name} is authorized with {entry.public}; revoke that first: "
                f"zrl keys revoke {entry.name} --keys {folder}"
            )
    file = folder / AUTHORIZED / f"{name}.public"
    if not file.exists():
        _write(file, key, 0o644)


def revoke(folder: Path, name: str) -> str:
    """Let `name` in no longer; its public key.

    Raises:
        ConfigError: nobody of this name is authorized, or the folder cannot be written.
    """
    check_name(name)
    _check_folder(folder)
    file = folder / AUTHORIZED / f"{name}.public"
    if not file.exists():
        known = ", ".join(entry.name for entry in entries(folder) if entry.state == AUTHORIZED)
        raise ConfigError(f"{name}: not authorized in {folder}; there are: {known or 'none'}")
    key = read_public(file)
    _make_folder(folder / REVOKED)
    try:
        with (folder / REVOKED / f"{name}.public").open("ab") as revoked:  # first: from here on it counts
            revoked.write(key + b"\n")
        os.utime(folder / REVOKED)
        file.unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder / REVOKED} cannot be written: {error.strerror}; {name} may still be let in"
        ) from None
    return key.decode()


def entries(folder: Path) -> list[Entry]:
    """All public keys in the folder.

    Raises:
        ConfigError: a folder that others can use, or a file that is no key.
    """
    _check_folder(folder)
    found = []
    for file in sorted(folder.glob("*.public")):
        own = file.with_suffix(".secret").exists()
        state = "own" if own else "learner" if file.stem == SERVER else "other"
        found.append(Entry(file.stem, state, read_public(file).decode()))
    for state in (AUTHORIZED, REVOKED):
        for file in sorted((folder / state).glob("*.public")):
            check_name(file.stem)
            found += [Entry(file.stem, state, key.decode()) for key in _lines(file)]
    return found


def key_of(text: str, field: str) -> bytes:
    """The key that `text` is.

    Raises:
        ConfigError: it is none; the text itself, which may be a secret, is not shown.
    """
    key = text.strip().encode()
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{field}: expected a key of {KEY_LENGTH} characters of Z85, found {len(key)} characters")
    return key


def read_public(file: Path) -> bytes:
    """The key in a public file; raises `ConfigError`."""
    keys = _lines(file)
    if len(keys) != 1:
        raise ConfigError(f"{file}: expected one line with a key, found {len(keys)}")
    return keys[0]


def check_name(name: str) -> None:
    """Raise a `ConfigError` for what cannot be the name of a host."""
    if name == SERVER or not _NAME.fullmatch(name):
        raise ConfigError(
            f"NAME: expected up to 64 letters, digits, '.', '_' or '-', the first a letter or digit, and not "
            f"{SERVER!r}, which is the learner; found {name!r:.100}"
        )


class Authorized:
    """Who may connect, as the folder says now: it is looked at again, so that changes count while a learner runs.

    While the folder cannot be trusted or read, nobody new is let in, and who was admitted stays so. Safe for several
    threads.

    Raises:
        ConfigError: it cannot be trusted or read at the start.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._users: dict[bytes, str] = {}
        self._revoked: frozenset[bytes] = frozenset()
        self._admitted: frozenset[str] = frozenset()
        self._seen: tuple[int, ...] = ()
        self._settled = False
        self._next_look = 0.0
        self._warned = False
        self._look()

    def user_of(self, public: bytes) -> str:
        """The user whose key this is: name, blank, key; "" for nobody."""
        self._refresh()
        return self._users.get(public, "")

    def is_revoked(self, public: bytes) -> bool:
        """Whether it was taken back; as of the last look."""
        return public in self._revoked

    def admits(self, user: str) -> bool:
        """Whether this user, as `user_of` had it, still may connect. For every message: it looks 10 times a second."""
        if time.monotonic() >= self._next_look:
            self._refresh()
        return user in self._admitted

    def _refresh(self) -> None:
        with self._lock:
            try:
                self._look()
                self._warned = False
            except (ConfigError, OSError) as error:
                self._users, self._seen = {}, ()
                if not self._warned:
                    logger.warning("nobody new is let in: %s", error)
                self._warned = True
            self._next_look = time.monotonic() + LOOK_AGAIN

    def _look(self) -> None:
        times = tuple(_changed(self._folder / name) for name in ("", AUTHORIZED, REVOKED))
        if times == self._seen and self._settled:
            return
        _check_folder(self._folder)
        read = [entry for entry in entries(self._folder) if entry.state in (AUTHORIZED, REVOKED)]
        revoked = frozenset(entry.public.encode() for entry in read if entry.state == REVOKED)
        users = {e.public.encode(): f"{e.name} {e.public}" for e in read if e.public.encode() not in revoked}
        self._users, self._revoked, self._admitted = users, revoked, frozenset(users.values())
        # what changes within one tick of the file system's clock does not change the time of change
        self._seen, self._settled = times, time.time() - max(times) / 1e9 > UNSETTLED


def _changed(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _trust(file: Path, key: bytes) -> None:
    if file.with_suffix(".secret").exists():
        raise ConfigError(f"{file}: that is this folder's own learner; hosts have a folder each")
    if not file.exists():
        _write(file, key, 0o644)
    elif read_public(file) != key:
        raise ConfigError(f"{file}: another learner is trusted already; if it has new keys, remove this file first")


def _load_pair(folder: Path, name: str) -> Pair:
    secret = folder / f"{name}.secret"
    keys = _lines(secret, private=True)
    if len(keys) != 1:
        raise ConfigError(f"{secret}: expected one line with a key, found {len(keys)}")
    public = read_public(folder / f"{name}.public")
    if zmq.curve_public(keys[0]) != public:
        raise ConfigError(f"{folder / name}.public: not the public key of {name}.secret; make another pair")
    return Pair(public, keys[0])


def _lines(file: Path, *, private: bool = False) -> list[bytes]:
    """The keys in a file, one a line; a private one must be ours alone."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | (os.O_NOFOLLOW if private else 0)), "rb") as opened:
            status = os.fstat(opened.fileno())
            if private and (status.st_uid != os.getuid() or status.st_mode & 0o077):
                raise ConfigError(
                    f"{file}: expected a file of yours with mode 0600, found {stat.S_IMODE(status.st_mode):04o} of "
                    f"user {status.st_uid}; others may have read it: make another pair, or chmod 0600"
                )
            lines = opened.read(1 << 20).split(b"\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    for key in keys:
        key_of(key.decode("latin-1"), str(file))
    return keys


def _write(file: Path, key: bytes, mode: int) -> None:
    """A new file with this key, under its name only when it is whole.

    Raises:
        ConfigError: it is there, or cannot be made.
    """
    draft = file.with_name(f".{file.name}.{os.urandom(4).hex()}")
    try:
        with _draft(draft, mode) as fd:
            os.write(fd, key + b"\n")
            os.fsync(fd)
        try:
            os.link(draft, file)  # unlike a rename it replaces nothing
        finally:
            draft.unlink()
    except FileExistsError:
        raise ConfigError(f"{file}: is there already; take another name or folder, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _draft(file: Path, mode: int) -> Iterator[int]:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)  # whatever the umask
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from None
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    try:
        status = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}: no folder with keys: {error.strerror}; see zrl keys new --help") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder}: expected a folder of yours with mode 0700, found {stat.S_IMODE(status.st_mode):04o} of user "
            f"{status.st_uid}; chmod 0700"
        )
