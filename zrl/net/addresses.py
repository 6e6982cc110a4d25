"""URLs of sockets: which are allowed, the folder for those on this machine, and what to say where one cannot be had."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import sys
import tempfile
from pathlib import Path

from zrl.errors import ConfigError

#: The longest path of a Unix socket, without its final zero byte.
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103


def run_directory() -> Path:
    """A new folder, 0700, with a path that is short enough for sockets. The caller removes it.

    In ``XDG_RUNTIME_DIR`` where that exists, else in the folder for temporary files, else in ``/tmp``.
    """
    wanted = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    room = MAX_SOCKET_PATH - len("/zrl-12345678/learner.sock.pub")
    for folder in wanted:
        if folder and len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="zrl-", dir=folder))
    raise ConfigError(f"no writable folder with a path of at most {room} bytes for sockets; tried {wanted}")


def pub_url(url: str) -> str:
    """Where the PUB socket is that belongs to the ROUTER at `url`: the next port, or the path with ``.pub``.

    Raises:
        ConfigError: a port that is not a number below 65535.
    """
    if url.startswith("ipc://"):
        return url + ".pub"
    head, _, port = url.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(f"{url}: expected a port from 1 to 65534, not {port!r}")
    return f"{head}:{int(port) + 1}"


def check_connect(url: str) -> None:
    """Raise a `ConfigError` for what is no URL to connect to."""
    port = url.rpartition(":")[2]
    if url.startswith("ipc:///") or (url.startswith("tcp://") and port.isascii() and port.isdigit()):
        return
    raise ConfigError(f"{url}: expected ipc:///PATH or tcp://HOST:PORT")


def check_bind(url: str, *, anywhere: bool = False) -> None:
    """Raise a `ConfigError` for a URL that may not or cannot be bound; it says what to do instead. With `anywhere` an
    address that other machines can reach may be."""
    if url.startswith("ipc://"):
        _check_ipc(Path(url.removeprefix("ipc://")))
    elif url.startswith("tcp://"):
        _check_tcp(url, anywhere)
    else:
        raise ConfigError(f"{url}: expected ipc://PATH or tcp://HOST:PORT")


def _check_ipc(path: Path) -> None:
    length = len(os.fsencode(path))
    if not path.is_absolute():
        raise ConfigError(f"ipc://{path}: expected an absolute path")
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"ipc://{path}: {length} bytes, a socket's path may have {MAX_SOCKET_PATH}: take a shorter folder (TMPDIR)"
        )
    try:
        folder = path.parent.stat()
    except OSError as error:
        raise ConfigError(f"ipc://{path}: no folder {path.parent}: {error.strerror}") from None
    if folder.st_uid != os.getuid() or stat.S_IMODE(folder.st_mode) & 0o077:
        raise ConfigError(f"ipc://{path}: {path.parent} must be yours alone: chmod 0700")
    if _answers(path):  # libzmq would take the path away from whoever listens there
        raise ConfigError(in_use(f"ipc://{path}"))


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


def is_loopback(url: str) -> bool:
    """Whether what is at `url` is on this machine."""
    if url.startswith("ipc://"):
        return True
    host = url.removeprefix("tcp://").rpartition(":")[0]
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


def reachable(url: str) -> str:
    """A URL that was bound, as others may connect to it: the wildcard address stands for one of this machine's own,
    that of the interface which leads out, else for its name."""
    host = url.removeprefix("tcp://").rpartition(":")[0]
    if host not in ("0.0.0.0", "[::]"):
        return url
    family, outside = (
        (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    )  # RFC 5737, RFC 3849: nobody's
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))  # nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        own = socket.gethostname()
    return url.replace(host, f"[{own}]" if ":" in own else own, 1)


def _check_tcp(url: str, anywhere: bool) -> None:
    host = url.removeprefix("tcp://").rpartition(":")[0]
    try:
        if host != "localhost":
            ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ConfigError(f"{url}: expected tcp://127.0.0.1:PORT, tcp://[::1]:PORT or tcp://localhost:PORT") from None
    if not anywhere and not is_loopback(url):
        raise ConfigError(
            f"{url}: not a loopback address. Other machines could connect unencrypted and unasked: that needs "
            "--keys DIR (see zrl keys), or --insecure to go without. Or bind tcp://127.0.0.1:PORT"
        )


def in_use(url: str) -> str:
    return f"{url}: address in use: another learner may be running there; choose another --bind, or end that one"
