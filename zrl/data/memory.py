"""One mapping of memory, private to a process or shared between two that need not know each other.

On Linux a shared mapping is a *sealed memfd*: memory that has a file descriptor and no name.

    owner                                          peer (same machine, same user)
    ─────                                          ──────────────────────────────
    memfd_create                                   gets (pid, fd, nbytes, boot id) in a message
    posix_fallocate   every page exists now        same boot id?           else: other machine
    fchmod 0600                                    open /proc/<pid>/fd/<fd> with O_PATH: nothing is opened yet
    seal: no shrink, no grow, no new seal          a regular file of exactly that size, with those seals?
    mmap              ── address ──►               reopen the pinned file, mmap, close

- No name exists, so nothing can be left behind, however the processes die: the pages go with the last mapping.
- The seals keep the size: a peer cannot truncate the file under a reader, which would kill the reader with SIGBUS.
- The pages are allocated at once, so that a full machine is an exception here instead of a SIGBUS later.
- `/dev/shm`, and its limit of 64 MB in containers, is not involved.

Elsewhere (macOS) a shared mapping is a temporary file, 0600 in a folder of its own, 0700. The owner calls `unlink` when
its peer has attached; `close` does it at the latest. A killed owner leaves that file, and a peer could truncate it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from zrl.errors import SharedMemoryError

Bytes = npt.NDArray[np.uint8]

# From the kernel's headers, the same on every architecture: a Python built against an old C library lacks some names.
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 0x1, 0x2, 0x8
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_V1_FILES = ("limit_in_bytes", "usage_in_bytes", "stat")  # of a control group
_V2_FILES = ("max", "current", "stat")
_HAS_MEMFD = sys.platform == "linux"
_MAX_FD = 1 << 20
_MAX_PID = 1 << 22
_FOLDER_PREFIX = "zrl-memory-"


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Where a peer on the same machine finds a mapping: plain values, ready for a message.

    Attributes:
        pid: process that owns the mapping.
        fd: its descriptor number there; -1 where `path` is used.
        nbytes: exact size.
        boot_id: identifies the machine and its boot; empty where the system has none.
        path: the temporary file; empty on Linux, where it is never looked at.
    """

    pid: int
    fd: int
    nbytes: int
    boot_id: str
    path: str = ""


class Memory:
    """A mapping of `nbytes` writable bytes, aligned to a page. Not safe for use by several threads at once.

    Make one with `private`, `create` or `attach`; `close` it, or use it as a context manager.
    """

    def __init__(self, mapping: mmap.mmap, nbytes: int, *, address: MemoryAddress | None = None, fd: int = -1) -> None:
        self._mapping: mmap.mmap | None = mapping
        self._data: Bytes | None = np.frombuffer(mapping, dtype=np.uint8, count=nbytes)
        self._address = address
        self._fd = fd  # only the owner of a memfd keeps one: its number is the address
        self._owner_pid = os.getpid()  # a forked child that closes its copy must not unlink the parent's file
        self.nbytes = nbytes

    @classmethod
    def private(cls, nbytes: int) -> Memory:
        """Zeroed memory of this process alone.

        Raises:
            SharedMemoryError: `nbytes` is not positive, or more than the system gives.
        """
        _check_size(nbytes)
        with _refusal(f"cannot map {nbytes} bytes of private memory"):
            return cls(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), nbytes)

    @classmethod
    def create(cls, nbytes: int) -> Memory:
        """Zeroed memory, completely allocated, that another process of this machine can attach.

        Raises:
            SharedMemoryError: not that much memory is free, or the system refuses; with the bytes and the errno.
        """
        _check_size(nbytes)
        with _refusal(f"cannot make {nbytes} bytes of shared memory"):
            return _create_memfd(nbytes) if _HAS_MEMFD else _create_file(nbytes)

    @classmethod
    def attach(cls, address: MemoryAddress, *, max_nbytes: int, writable: bool = True) -> Memory:
        """The memory that another process created. `address` is not trusted: see the top of this module.

        Args:
            address: from the peer.
            max_nbytes: refuse more than this.
            writable: without it the mapping is for reading only, and so is `data`.

        Raises:
            SharedMemoryError: with the reason: another machine, a process or descriptor that is gone or forbidden, or
                a descriptor that is not a sealed memfd of that size.
        """
        _check_address(address, max_nbytes)
        who = f"cannot attach descriptor {address.fd} of process {address.pid} ({address.nbytes} bytes)"
        with _refusal(who):
            fd = _open_memfd(address, writable) if _HAS_MEMFD else _open_file(address, writable)
            try:
                return cls(_map(fd, address.nbytes, writable), address.nbytes, address=address)
            finally:
                os.close(fd)

    @property
    def data(self) -> Bytes:
        """All bytes, `[nbytes]` uint8: always the same array.

        Raises:
            SharedMemoryError: the memory is closed.
        """
        if self._data is None:
            raise SharedMemoryError("this memory is closed")
        return self._data

    @property
    def address(self) -> MemoryAddress:
        """What a peer needs to attach.

        Raises:
            SharedMemoryError: the memory is private.
        """
        if self._address is None:
            raise SharedMemoryError("private memory has no address: create it shared")
        return self._address

    def unlink(self) -> None:
        """Remove the temporary file, once the peer has attached. Nothing to do on Linux, for peers, or twice."""
        path = self._address.path if self._address is not None and self._fd >= 0 else ""
        if path and self._owner_pid == os.getpid():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))

    def close(self) -> None:
        """Let go of the mapping and of the descriptor; idempotent.

        Views that NumPy or torch still hold stay valid: then the pages are unmapped with the last of them. Before
        Python 3.13 the `mmap` object keeps a descriptor of its own until that moment.
        """
        self.unlink()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        mapping, self._mapping, self._data = self._mapping, None, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # "cannot close exported pointers exist"
                mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def check_header(what: str, fields: dict[str, tuple[Any, Any]]) -> None:
    """Compare a header, `{name: (expected, found)}`, field by field, in order.

    Raises:
        SharedMemoryError: names the first field that differs, what was expected and what was found.
    """
    for name, (expected, found) in fields.items():
        if expected != found:
            shown = [value.hex() if isinstance(value, bytes) else repr(value) for value in (expected, found)]
            raise SharedMemoryError(f"{what}: {name}: expected {shown[0]}, found {shown[1]}")


def check_id(name: str, value: bytes) -> None:
    """Raise a SharedMemoryError unless `value` is 16 bytes."""
    if not isinstance(value, bytes) or len(value) != 16:
        raise SharedMemoryError(f"{name}: expected 16 bytes, found {value!r}")


# ── Linux ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _create_memfd(nbytes: int) -> Memory:
    free = available_bytes()
    if nbytes > free:  # asking the kernel would not fail: it would hand out pages until the OOM killer comes
        raise OSError(errno.ENOMEM, f"{os.strerror(errno.ENOMEM)}: {free} bytes are available")
    fd = _memfd_create("zrl")
    try:
        _allocate(fd, nbytes)
        os.fchmod(fd, 0o600)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        address = MemoryAddress(pid=os.getpid(), fd=fd, nbytes=nbytes, boot_id=boot_id())
        return Memory(_map(fd, nbytes, writable=True), nbytes, address=address, fd=fd)
    except BaseException:
        os.close(fd)
        raise


def _memfd_create(name: str) -> int:
    """An empty memfd that may be sealed, never executable where the kernel (6.3) knows how to say so."""
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    create: Callable[[str, int], int] = getattr(os, "memfd_create", _libc_memfd_create)
    try:
        return create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return create(name, flags)


def _libc_memfd_create(name: str, flags: int) -> int:
    """For Pythons that were built against a C library older than the one that they run with (conda does that)."""
    try:
        create = ctypes.CDLL(None, use_errno=True).memfd_create
    except AttributeError:
        raise OSError(errno.ENOSYS, "the C library has no memfd_create (glibc 2.27)") from None
    fd = int(create(name.encode(), ctypes.c_uint(flags)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _open_memfd(address: MemoryAddress, writable: bool) -> int:
    """A descriptor of the peer's memfd, verified.

    The number may stand for anything: opening a FIFO or a device can block or act. O_PATH opens nothing, and pins
    the file, so that what is reopened is what was looked at.
    """
    if sys.platform != "linux":  # for the type checker
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    own = boot_id()
    if not own or own != address.boot_id:
        raise SharedMemoryError(f"its machine has boot id {address.boot_id!r:.60}, this one {own!r}")
    pinned = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        _check_file(os.fstat(pinned), address.nbytes)
        # before it is opened: closing a file of one's own gives up the locks that one has on it
        if not os.readlink(f"/proc/self/fd/{pinned}").startswith("/memfd:"):
            raise SharedMemoryError("it is a file, not a memfd")
        mode = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(f"/proc/self/fd/{pinned}", mode | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(pinned)
    try:
        _check_seals(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_seals(fd: int) -> None:
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        raise SharedMemoryError("it is a file, not a memfd") from None
    if seals & _SEALS != _SEALS:  # a file of a tmpfs has F_SEAL_SEAL alone, so this refuses it too
        raise SharedMemoryError(f"it is not sealed against changes of its size (seals {seals:#x}, need {_SEALS:#x})")


def boot_id() -> str:
    """Random id of this boot of this machine, the same in its containers; empty where the system has none."""
    return "".join(_lines("/proc/sys/kernel/random/boot_id")).strip()


def available_bytes(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """What this process may still allocate without swapping others out or being killed, as far as Linux tells.

    The least of the machine (MemAvailable + SwapFree) and of the limits of our control groups (Kubernetes, Slurm,
    Docker), of either version. An estimate: others allocate at the same time.
    """
    lines = _lines(f"{proc}/meminfo")
    info = {key: int(rest.split()[0]) << 10 for key, _, rest in (line.partition(":") for line in lines)}
    machine = info["MemAvailable"] + info.get("SwapFree", 0) if "MemAvailable" in info else sys.maxsize
    return min(machine, *_cgroup_rooms(proc, cgroups), sys.maxsize)


def _cgroup_rooms(proc: str, cgroups: str) -> Iterator[int]:
    """Bytes left in our control group and in each of its parents that has a limit."""
    for line in _lines(f"{proc}/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = f"{cgroups}/memory" if controllers else cgroups
        names, prefix = (_V1_FILES, "total_") if controllers else (_V2_FILES, "")
        for group in [Path(own), *Path(own).parents]:
            limit, used, details = (_lines(f"{root}/{group}/memory.{name}") for name in names)
            if limit and used and limit[0] != "max":  # the root group of version 2 has no limit
                stats = dict(line.split() for line in details)
                files = sum(int(stats.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(limit[0]) - int(used[0]) + files  # cached files count as used, but give way


def _lines(path: str) -> list[str]:
    """Lines of a small text file of the kernel; none if it does not exist or may not be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


# ── elsewhere ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _create_file(nbytes: int) -> Memory:
    folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX)  # 0700
    path = os.path.join(folder, "memory")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _allocate(fd, nbytes)
        address = MemoryAddress(pid=os.getpid(), fd=-1, nbytes=nbytes, boot_id=boot_id(), path=path)
        return Memory(_map(fd, nbytes, writable=True), nbytes, address=address, fd=fd)
    except BaseException:
        os.close(fd)
        os.unlink(path)
        os.rmdir(folder)
        raise


def _open_file(address: MemoryAddress, writable: bool) -> int:
    """A descriptor of the peer's file: only a file of our own, in a folder of our own, made by `_create_file`."""
    folder = os.path.dirname(address.path)
    if not os.path.isabs(address.path) or not os.path.basename(folder).startswith(_FOLDER_PREFIX):
        raise SharedMemoryError("its path is not one that zrl makes")
    _check_owner(os.lstat(folder))
    mode = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(address.path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        _check_owner(os.fstat(fd))
        _check_file(os.fstat(fd), address.nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_owner(found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise SharedMemoryError("it belongs to another user, or is open to others")


# ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _allocate(fd: int, nbytes: int) -> None:
    """Give an empty file its size and all its pages."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
        return
    zeros = bytes(min(nbytes, 1 << 20))
    for start in range(0, nbytes, len(zeros)):
        os.pwrite(fd, zeros[: nbytes - start], start)


def _map(fd: int, nbytes: int, writable: bool) -> mmap.mmap:
    prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    if sys.version_info >= (3, 13):  # without a second descriptor for the life of the mapping
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=prot, trackfd=False)
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=prot)


def _check_size(nbytes: int) -> None:
    if not 0 < nbytes < sys.maxsize:
        raise SharedMemoryError(f"memory of {nbytes} bytes cannot be made")


def _check_file(found: os.stat_result, nbytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SharedMemoryError(f"it is not memory but a {stat.filemode(found.st_mode)} file")
    if found.st_size != nbytes:
        raise SharedMemoryError(f"it has {found.st_size} bytes")


def _check_address(address: MemoryAddress, max_nbytes: int) -> None:
    numbers = {"pid": (1, _MAX_PID), "fd": (0 if _HAS_MEMFD else -1, _MAX_FD - 1), "nbytes": (1, max_nbytes)}
    for name, (least, most) in numbers.items():
        value = getattr(address, name)
        if type(value) is not int or not least <= value <= most:
            raise SharedMemoryError(f"address: {name}: expected an int of {least} to {most}, found {value!r:.60}")
    for name in ("boot_id", "path"):
        value = getattr(address, name)
        if type(value) is not str or len(value) > 4096 or "\0" in value:
            raise SharedMemoryError(f"address: {name}: expected a text, found {value!r:.60}")


@contextlib.contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Turn whatever the system says, or our own check, into one SharedMemoryError that begins with `what`."""
    try:
        yield
    except SharedMemoryError as error:
        raise SharedMemoryError(f"{what}: {error}") from None
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "no errno")
        raise SharedMemoryError(f"{what}: {name}: {error.strerror or error}") from error
