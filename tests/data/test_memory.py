"""One mapping: what a peer may attach, what it may not, and what is left behind (nothing)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zrl
from zrl.data import memory as memory_module
from zrl.data.memory import Memory, MemoryAddress, available_bytes, boot_id
from zrl.errors import SharedMemoryError

ROOT = Path(zrl.__file__).parents[1]
DEADLINE_S = 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux")

OWNER = """
import dataclasses, json, os, sys
from zrl.data.memory import Memory
memory = Memory.create(int(sys.argv[1]))
memory.data[:] = 7
print(json.dumps(dataclasses.asdict(memory.address)), flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def child(script: str, *args: object, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A second interpreter that runs `script`; killed and reaped at the end."""
    command = [sys.executable, "-c", script, *map(str, args)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def address_from(process: subprocess.Popen[str]) -> MemoryAddress:
    assert process.stdout is not None
    return MemoryAddress(**json.loads(process.stdout.readline()))


def refused(address: MemoryAddress, reason: str, max_nbytes: int = 1 << 20) -> None:
    with pytest.raises(SharedMemoryError, match=reason):
        Memory.attach(address, max_nbytes=max_nbytes)


def own(fd: int, nbytes: int = 4096) -> MemoryAddress:
    return MemoryAddress(pid=os.getpid(), fd=fd, nbytes=nbytes, boot_id=boot_id())


def test_private_memory_is_zeroed_aligned_writable_and_has_no_address() -> None:
    with Memory.private(1000) as memory:
        assert memory.data.shape == (1000,)
        assert memory.data.dtype == np.uint8
        assert memory.data.ctypes.data % 64 == 0
        assert not memory.data.any()
        memory.data[:] = 3
        assert memory.data is memory.data
        with pytest.raises(SharedMemoryError, match="no address"):
            _ = memory.address


def test_two_mappings_of_one_process_see_each_other() -> None:
    with Memory.create(5000) as memory, Memory.attach(memory.address, max_nbytes=5000) as peer:
        assert not memory.data.any()
        memory.data[4999] = 9
        assert peer.data[4999] == 9
        peer.data[0] = 8
        assert memory.data[0] == 8
        assert peer.address == memory.address


def test_read_only_attachment_cannot_be_written() -> None:
    with Memory.create(100) as memory, Memory.attach(memory.address, max_nbytes=100, writable=False) as peer:
        memory.data[:] = 5
        assert peer.data.sum() == 500
        with pytest.raises(ValueError, match="read-only"):
            peer.data[0] = 1


def test_close_is_idempotent_and_ends_the_use() -> None:
    memory = Memory.create(100)
    address = memory.address
    memory.close()
    memory.close()
    with pytest.raises(SharedMemoryError, match="closed"):
        _ = memory.data
    refused(address, "ENOENT" if sys.platform == "linux" else "")


def test_views_survive_close() -> None:
    memory = Memory.create(100)
    peer = Memory.attach(memory.address, max_nbytes=100)
    view, tensor = memory.data[10:20], torch.from_numpy(peer.data)
    memory.data[:] = 4
    memory.close()
    peer.close()
    assert view.tolist() == [4] * 10
    view[:] = 6
    assert tensor[10:20].tolist() == [6] * 10  # still the same pages


@pytest.mark.parametrize("nbytes", [0, -1, sys.maxsize, 1 << 70])
def test_senseless_sizes_are_refused(nbytes: int) -> None:
    for make in (Memory.create, Memory.private):
        with pytest.raises(SharedMemoryError, match=str(nbytes)):
            make(nbytes)


@linux
def test_more_than_the_machine_has_is_a_clear_error() -> None:
    with pytest.raises(SharedMemoryError, match=r"1125899906842624 bytes.*ENOMEM.*bytes are available"):
        Memory.create(1 << 50)


@linux
def test_a_failing_allocation_is_a_clear_error() -> None:
    script = """
import resource
from zrl.data.memory import Memory
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Memory.create(8192)
except Exception as error:
    print(type(error).__name__, error)
"""
    with child(script) as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert out.startswith("SharedMemoryError cannot make 8192 bytes of shared memory: EFBIG")


@linux
def test_memory_limits_of_control_groups_count(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   800 kB\nSwapFree: 100 kB\n")
    assert available_bytes(str(tmp_path), str(tmp_path)) == 900 * 1024
    (tmp_path / "self" / "cgroup").write_text("4:memory:/old\n0::/pod/box\n")
    (tmp_path / "pod" / "box").mkdir(parents=True)
    for folder, limit in (("pod", "5000"), ("pod/box", "max")):
        (tmp_path / folder / "memory.max").write_text(limit + "\n")
        (tmp_path / folder / "memory.current").write_text("3000\n")
        (tmp_path / folder / "memory.stat").write_text("anon 7\nactive_file 100\ninactive_file 20\n")
    assert available_bytes(str(tmp_path), str(tmp_path)) == 2120
    assert available_bytes(str(tmp_path / "none"), str(tmp_path)) == sys.maxsize
    old = tmp_path / "memory" / "old"
    old.mkdir(parents=True)
    for name, text in (
        ("limit_in_bytes", "4000"),
        ("usage_in_bytes", "3500"),
        ("stat", "active_file 1\ntotal_active_file 500\ntotal_inactive_file 7"),
    ):
        (old / f"memory.{name}").write_text(text + "\n")
    assert available_bytes(str(tmp_path), str(tmp_path)) == 1007


@linux
def test_memfd_is_sealed_and_private_to_the_user() -> None:
    with Memory.create(4096) as memory:
        path = f"/proc/self/fd/{memory.address.fd}"
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(memory.address.fd)
        assert os.stat(path).st_blocks * 512 >= 4096  # allocated
        fd = os.open(path, os.O_RDWR)
        for nbytes in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, nbytes)
        os.close(fd)


@linux
def test_libc_fallback_makes_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with Memory.create(4096) as memory, Memory.attach(memory.address, max_nbytes=4096) as peer:
        memory.data[7] = 1
        assert peer.data[7] == 1


@linux
def test_kernels_without_noexec_memfds_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.memfd_create

    def old_kernel(name: str, flags: int) -> int:
        if flags & ~0x7:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", old_kernel)
    with Memory.create(4096) as memory, Memory.attach(memory.address, max_nbytes=4096):
        pass


@pytest.mark.parametrize(
    "field",
    [
        {"pid": 0},
        {"pid": -1},
        {"pid": True},
        {"pid": "1"},
        {"pid": 1 << 40},
        {"fd": -2},
        {"fd": 1 << 20},
        {"fd": 1.0},
        {"fd": None},
        {"nbytes": 0},
        {"nbytes": 4097},
        {"nbytes": 1 << 80},
        {"boot_id": 1},
        {"boot_id": "x" * 5000},
        {"path": b"/tmp"},
        {"path": "a\0b"},
    ],
)
def test_malformed_addresses_are_refused(field: dict[str, Any]) -> None:
    with Memory.create(4096) as memory:
        refused(dataclasses.replace(memory.address, **field), next(iter(field)), max_nbytes=4096)


@linux
def test_other_machines_are_refused() -> None:
    with Memory.create(4096) as memory:
        refused(dataclasses.replace(memory.address, boot_id="0" * 36), "boot id '0000")
        refused(dataclasses.replace(memory.address, boot_id=""), "boot id")


@linux
def test_another_size_is_refused() -> None:
    with Memory.create(4096) as memory:
        refused(dataclasses.replace(memory.address, nbytes=4095), "it has 4096 bytes")
        refused(dataclasses.replace(memory.address, nbytes=8192), "it has 4096 bytes")


@linux
@pytest.mark.parametrize("seals", [0, 0x2, 0x2 | 0x4, 0x1 | 0x2, 0x1 | 0x4])
def test_memfds_without_all_seals_are_refused(seals: int) -> None:
    import fcntl

    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, 1033, seals)
        refused(own(fd), "not sealed")
    finally:
        os.close(fd)


@linux
def test_write_sealed_memfd_is_refused() -> None:
    import fcntl

    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, 1033, 0xF)
        refused(own(fd), "EPERM|EACCES")
    finally:
        os.close(fd)


@linux
def test_other_kinds_of_files_are_refused_without_blocking(tmp_path: Path) -> None:
    regular = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(regular, 4096)
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    descriptors = [regular, fifo, *os.pipe(), os.open(tmp_path, os.O_RDONLY), os.open("/dev/null", os.O_RDWR)]
    try:
        refused(own(regular), "a file, not a memfd")
        refused(own(regular, 1), "it has 4096 bytes")
        for fd in descriptors[1:]:
            refused(own(fd), "it is not memory")
    finally:
        for fd in descriptors:
            os.close(fd)


@linux
def test_a_file_of_ours_keeps_its_locks(tmp_path: Path) -> None:
    """A peer may name any descriptor of the learner. To open that file and close it again would give its locks up."""
    with (tmp_path / "locked").open("wb+") as file:
        file.truncate(4096)
        fcntl.lockf(file, fcntl.LOCK_EX)
        refused(own(file.fileno()), "it is a file, not a memfd")
        code = (
            "import fcntl, sys\n"
            "try: fcntl.lockf(open(sys.argv[1], 'rb+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except BlockingIOError: sys.exit(7)\n"
        )
        assert subprocess.run([sys.executable, "-c", code, file.name], check=False).returncode == 7


@linux
def test_a_file_of_a_tmpfs_is_refused() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm is not writable")
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.ftruncate(fd, 4096)
        refused(own(fd), "not sealed|not a memfd")
    finally:
        os.close(fd)


@linux
def test_a_path_from_a_peer_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with Memory.create(4096) as memory:
        memory.data[0] = 1
        address = dataclasses.replace(memory.address, path=str(tmp_path / "file"))
        with Memory.attach(address, max_nbytes=4096) as peer:
            assert peer.data[0] == 1


@linux
def test_a_dead_process_is_refused() -> None:
    with child(OWNER, 4096) as process:
        address = address_from(process)
        process.kill()
        process.wait(DEADLINE_S)
        refused(address, "ENOENT|ESRCH")


@linux
def test_killed_owner_leaves_the_mapping_and_nothing_else(tmp_path: Path) -> None:
    def names() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if "zrl" in name}

    before = names()
    with (
        child(OWNER, 10_000, env={**os.environ, "TMPDIR": str(tmp_path)}) as process,
        Memory.attach(address_from(process), max_nbytes=10_000) as memory,
    ):
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        assert (memory.data == 7).all()
        memory.data[:] = 8
        assert (memory.data == 8).all()
        assert names() == before
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_tiny_dev_shm_does_not_matter() -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare to mount a tiny /dev/shm")
    script = "from zrl.data.memory import Memory; Memory.create(1 << 20).data[:] = 1; print('made')"
    shell = f'mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec {sys.executable} -c "{script}"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    if done.returncode in (1, 77) and "made" not in done.stdout and "Traceback" not in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.stdout == "made\n", done.stderr


# ── the temporary file of systems without memfd, tried wherever the tests run ───────────────────────────────────────


@pytest.fixture
def without_memfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(memory_module, "_HAS_MEMFD", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("fallocate", [True, False])
def test_file_is_attached_then_unlinked(without_memfd: Path, fallocate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with Memory.create(3_000_000) as memory:
        path = Path(memory.address.path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_size == 3_000_000
        with Memory.attach(memory.address, max_nbytes=3_000_000) as peer:
            peer.unlink()  # a peer's does nothing
            assert path.exists()
            memory.unlink()
            memory.unlink()
            assert list(without_memfd.iterdir()) == []
            memory.data[-1] = 5
            assert peer.data[-1] == 5


def test_file_is_gone_at_close(without_memfd: Path) -> None:
    memory = Memory.create(100)
    memory.close()
    memory.close()
    assert list(without_memfd.iterdir()) == []


def test_file_of_a_failed_allocation_is_gone(without_memfd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(SharedMemoryError, match=r"100 bytes.*ENOSPC"):
        Memory.create(100)
    assert list(without_memfd.iterdir()) == []


def test_files_that_zrl_did_not_make_are_refused(without_memfd: Path) -> None:
    with Memory.create(mmap.PAGESIZE) as memory:
        folder = Path(memory.address.path).parent

        def at(path: Path | str) -> MemoryAddress:
            return dataclasses.replace(memory.address, path=str(path))

        foreign = without_memfd / "foreign"
        foreign.write_bytes(bytes(mmap.PAGESIZE))
        refused(at(foreign), "not one that zrl makes")
        refused(at("zrl-memory-x/memory"), "not one that zrl makes")
        refused(at(""), "not one that zrl makes")
        (folder / "link").symlink_to(foreign)
        refused(at(folder / "link"), "ELOOP")
        (folder / "link").unlink()
        refused(dataclasses.replace(memory.address, nbytes=1), f"it has {mmap.PAGESIZE} bytes")
        folder.chmod(0o755)
        refused(memory.address, "open to others")
