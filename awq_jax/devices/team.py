"""The processes of one run: they exchange short texts, and each learns at once when another ends.

JAX's own collectives wait, some of them for ever, for a process that has died, and its coordination service
notices only after a while. So every process keeps a connection to the first one: the kernel closes it the
moment a process dies. Before each collective they meet there (`Team.gather`), which is where a loss becomes an
error; a process that is caught inside of a collective is ended after a few seconds.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from awq_jax.errors import AwqError, ConfigError, ProcessError

EXIT = 3  # exit code of a process that was ended because of another
GRACE = 10.0  # seconds that a process has to end by itself once another is lost
NOTICE = 5.0  # seconds in which a failed collective is explained by the loss of a process
CONNECT = 60.0  # seconds
HELLO = 5.0  # seconds for a process that has connected to say which it is
AGAIN = "Run the same command again in every process: it continues after the last finished block"
_ADDRESS = 1024  # bytes
_Message = tuple[str, str | list[str]]  # what it is, and its text or texts


class Team:
    """The processes of a run, seen from one of them.

    Attributes:
      rank: the number of this process.
      size: how many there are.
      lost: what became of another one, "" while all is well.
    """

    def __init__(self, rank: int, size: int, links: dict[int, socket.socket]) -> None:
        self.rank, self.size, self.lost = rank, size, ""
        self._links, self._closed = links, False
        self._came = threading.Condition()
        self._sending = threading.Lock()
        self._inbox: dict[int, deque[str | list[str]]] = {r: deque() for r in links}
        for r in links:
            threading.Thread(target=self._listen, args=(r,), daemon=True, name=f"process {r}").start()

    def gather(self, text: str = "") -> list[str]:
        """Wait for all processes: the texts that they came with, in order.

        Raises:
          ProcessError: one of them has ended.
        """
        if self.rank:
            self._send(0, ("mine", text))
            return [str(t) for t in self._next(0)]
        texts = [text, *(str(self._next(r)) for r in sorted(self._links))]
        for r in self._links:
            self._send(r, ("all", texts))
        return texts

    def close(self, error: str = "") -> None:
        """Leave; ``error`` is told to the others, who will end."""
        with self._came:
            if self._closed:
                return
            self._closed = True
        for r, link in self._links.items():
            self._send(r, ("lost", f"process {self.rank} stopped: {error}") if error else ("done", ""))
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)

    def wait_for_loss(self) -> str:
        """`lost`, once it is known; "" if nothing is for some seconds."""
        with self._came:
            self._came.wait_for(lambda: bool(self.lost), NOTICE)
        return self.lost

    def _next(self, rank: int) -> str | list[str]:
        with self._came:
            self._came.wait_for(lambda: bool(self._inbox[rank]) or bool(self.lost))
            if self._inbox[rank]:
                return self._inbox[rank].popleft()
        raise ProcessError(f"{self.lost}. {AGAIN}")

    def _send(self, rank: int, message: _Message) -> None:
        with self._sending, contextlib.suppress(OSError):  # the listener says why it failed
            _write(self._links[rank], message)

    def _listen(self, rank: int) -> None:
        while True:
            try:
                kind, value = _read(self._links[rank])
            except (OSError, EOFError, ValueError):
                return self._lose(f"process {rank} died, or cannot be reached any more")
            if kind == "done":
                return
            if kind == "lost":
                return self._lose(str(value))
            with self._came:
                self._inbox[rank].append(value)
                self._came.notify_all()

    def _lose(self, what: str) -> None:
        with self._came:
            if self._closed or self.lost:
                return
            self.lost = what
            self._came.notify_all()
        if not self.rank:
            for r in self._links:
                self._send(r, ("lost", what))
        time.sleep(GRACE)  # this thread has nothing else to do
        if not self._closed:
            _end(f"{what}. {AGAIN}")


@contextlib.contextmanager
def team() -> Iterator[Team | None]:
    """The processes of this JAX job, which all must come here; None if there is only one.

    Raises:
      ProcessError: another process has ended; instead of what JAX makes of that.
    """
    if jax.process_count() == 1:
        yield None
        return
    here = _form()
    try:
        yield here
    except ProcessError:
        here.close()
        raise
    except (AwqError, OSError) as e:
        here.close(str(e))
        raise
    except Exception as e:
        lost = here.wait_for_loss()
        here.close(f"{type(e).__name__}: {e}")
        if lost:
            raise ProcessError(f"{lost}. {AGAIN}") from e
        raise
    except BaseException as e:
        here.close(type(e).__name__)
        raise
    here.close()


def join(coordinator: str | None, processes: int | None, rank: int | None, heartbeat: int = 30) -> None:
    """`jax.distributed.initialize`, such that a process which JAX ends because of another one says so.

    Args:
      coordinator: ``host:port`` on which process 0 is to listen; with the others None: found by JAX (Slurm, MPI,
        Kubernetes, TPU).
      processes: how many.
      rank: the number of this one, from 0.
      heartbeat: seconds after which a machine that does not answer counts as lost.

    Raises:
      ConfigError: numbers that make no sense, or JAX finds no cluster.
    """
    if (coordinator, processes, rank) != (None, None, None):
        if coordinator is None or processes is None or rank is None:
            raise ConfigError("coordinator, processes and process id belong together: give all three")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"coordinator must be HOST:PORT; got {coordinator!r}")
        if not 0 <= rank < processes:
            raise ConfigError(f"process id {rank} is not one of 0 to {processes - 1}, for {processes} processes")
    _explain_aborts()
    try:
        jax.distributed.initialize(
            coordinator, processes, rank, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat
        )
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"cannot join the other processes: {e}") from e


def _form() -> Team:
    """Connect every process to the first."""
    rank, size = jax.process_index(), jax.process_count()
    server, mine = None, b""
    if not rank:
        server = socket.create_server(("", 0), backlog=size)
        server.settimeout(CONNECT)
        token = secrets.token_hex(16)
        mine = json.dumps([_own_addresses(), server.getsockname()[1], token]).encode()
    block = np.zeros(_ADDRESS, np.uint8)
    block[: len(mine)] = np.frombuffer(mine, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(block)).astype(np.uint8).tobytes()
    hosts, port, token = json.loads(told.rstrip(b"\0"))
    if server is None:
        return Team(rank, size, {0: _connect(hosts, port, token, rank)})
    links: dict[int, socket.socket] = {}
    with server:
        while len(links) < size - 1:
            try:
                link, _ = server.accept()
            except OSError as e:
                raise ConfigError(f"{size - 1 - len(links)} processes did not connect to process 0 ({e})") from e
            other = _welcome(link, token)
            if other is None:  # a stranger
                link.close()
            else:
                links[other] = _configured(link)
    return Team(rank, size, links)


def _welcome(link: socket.socket, token: str) -> int | None:
    """Greet a process that has connected: its number, or None if it is not one of this run."""
    try:
        link.settimeout(HELLO)
        _, greeting = _read(link, 4096)
        if not isinstance(greeting, list) or len(greeting) != 2 or greeting[0] != token:
            return None
        _write(link, ("welcome", token))
        return int(greeting[1])
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _connect(hosts: list[str], port: int, token: str, rank: int) -> socket.socket:
    for host in hosts:
        with contextlib.suppress(OSError, EOFError, ValueError):
            link = socket.create_connection((host, port), timeout=CONNECT / 6)
            _write(link, ("hello", [token, str(rank)]))
            if _read(link)[1] == token:
                return _configured(link)
    where = " or ".join(hosts)
    raise ConfigError(f"process {rank} cannot reach process 0 at port {port} of {where}: open its firewall")


def _own_addresses() -> list[str]:
    """Where other machines may reach this one; the last is for processes on the same machine."""
    found = []
    with contextlib.suppress(OSError):
        found += [str(a[4][0]) for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which interface leads outside
        found.append(probe.getsockname()[0])
    return [*dict.fromkeys(a for a in found[:8] if not a.startswith("127.")), "127.0.0.1"]


def _configured(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine without power closes nothing
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link


def _write(link: socket.socket, message: _Message) -> None:
    data = json.dumps(message).encode()
    link.sendall(struct.pack(">Q", len(data)) + data)


def _read(link: socket.socket, limit: int | None = None) -> _Message:
    (size,) = struct.unpack(">Q", _exactly(link, 8))
    if limit is not None and size > limit:
        raise ValueError("not a message")
    message = json.loads(_exactly(link, size))
    if not isinstance(message, list) or len(message) != 2:
        raise ValueError("not a message")
    return message[0], message[1]


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        got = link.recv(min(size - len(data), 1 << 20))
        if not got:
            raise EOFError
        data += got
    return bytes(data)


def _end(message: str) -> None:
    os.write(2, f"awq-jax: error: {message}\n".encode())
    os._exit(EXIT)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_HANDLER
def _aborted(number: int) -> None:
    _end(f"this process was aborted. If nothing above says why, process 0 has died. {AGAIN}")


def _explain_aborts() -> None:
    """JAX aborts when process 0 dies, which it does itself and offers no hook for; the abort ends here instead."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, _HANDLER)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, _aborted)
