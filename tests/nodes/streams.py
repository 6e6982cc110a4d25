"""CUDA streams as threads, so that what waits for what can be tested without a device: `Fake` stands for `torch.cuda`.

Inside ``with fake.stream(s)`` every `copy_` is queued instead of done, and everything else happens at once. The thread
of the stream does what is queued, in order, and late. So whoever reads or writes too early finds the wrong bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DEADLINE = 30.0


class FakeStream:
    def __init__(self, device: object = None, delay: float = 0.0) -> None:
        self.delay = delay
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-stream")
        self._thread.start()

    def _run(self) -> None:
        while (call := self._todo.get()) is not None:
            time.sleep(self.delay)
            call()

    def put(self, call: Callable[[], object]) -> None:
        self._todo.put(call)

    def wait_event(self, event: FakeEvent) -> None:
        if (done := event.done) is not None:  # as it is now: recorded anew, it is another moment
            self.put(lambda: _wait(done))

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = FakeEvent()
        event.record(self)
        event.synchronize()

    def end(self) -> None:
        self._todo.put(None)
        self._thread.join(DEADLINE)


class FakeEvent:
    def __init__(self, blocking: bool = False) -> None:
        self.done: threading.Event | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self.done = threading.Event()
        (stream or _current()).put(self.done.set)

    def synchronize(self) -> None:
        if self.done is not None:
            _wait(self.done)


class _Queued(TorchFunctionMode):
    """Puts every `copy_` of this thread on a stream."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__()
        self._stream = stream

    def __enter__(self) -> Any:
        _here.streams = [*getattr(_here, "streams", []), self._stream]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *args: object) -> None:
        _here.streams.pop()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self._stream.put(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


class Fake:
    """What `zrl.nodes.buffers` uses of `torch.cuda`. The user's stream is `user`; ours is made with `delay`.

    Registering memory fails with the code `refuse`.
    """

    Event = FakeEvent

    def __init__(self, delay: float = 0.0, refuse: int = 0) -> None:
        self.delay, self.refuse = delay, refuse
        self.user = FakeStream()
        self.streams = [self.user]
        self.registered: list[tuple[int, int, int]] = []

    def Stream(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(device, self.delay))
        return self.streams[-1]

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.user

    def stream(self, stream: FakeStream) -> _Queued:
        return _Queued(stream)

    def device(self, device: torch.device) -> torch.device:
        return device  # a context manager as well

    def cudart(self) -> Fake:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.refuse:
            self.registered.append((address, nbytes, flags))
        return self.refuse

    def cudaHostUnregister(self, address: int) -> int:
        self.registered = [x for x in self.registered if x[0] != address]
        return 0

    def end(self) -> None:
        for stream in self.streams:
            stream.end()


_here = threading.local()


def _current() -> FakeStream:
    stream: FakeStream = _here.streams[-1]
    return stream


def _wait(done: threading.Event) -> None:
    if not done.wait(DEADLINE):
        raise TimeoutError("nobody records that event")
