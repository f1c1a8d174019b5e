# SPDX-License-Identifier: Apache-2.0
"""What clients of both kinds share: calls as values, retries, and where the server is.

An operation is a function that checks its arguments and returns a `Unary` or a `Stream`: messages
to send and how to read the answer. `dynsplit.Client` runs it blocking, `dynsplit.aio.Client` awaits
it; both do so under `Retry`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from dynsplit import errors, streams
from dynsplit.v1 import compression_pb2

T = TypeVar("T")

Road = Literal["auto", "cuda-ipc", "memfd", "shm", "inline", "unix", "tcp"]
"""How tensors reach the server.

"cuda-ipc": through memory of the server's GPU that both map. "memfd": through sealed shared memory
without a name, passed over the server's region socket. "shm": through POSIX shared memory.
"inline": in the stream. "unix" and "tcp": inline, over that kind of socket. "auto": the first of
cuda-ipc (torch tensors on a GPU, and an engine given), memfd (a region socket given), shm and
inline that server and host allow, call by call.
"""

OnError = Literal["raise", "passthrough"]


@dataclasses.dataclass(frozen=True)
class Retry:
    """When a failed call is made again.

    A refusal with a retry delay (queue full, draining) left nothing behind and is repeated after
    that delay, for any call. A connection that cannot be had or breaks is repeated, with
    exponential delays, only for calls that may run twice: those that read, and those that compute
    without keeping. Nothing is repeated beyond the call's deadline.

    Attributes:
        attempts: most tries of a call, >= 1; 1 = never again.
        base_seconds: first delay after a broken connection; doubles each time.
        max_seconds: longest single delay. A server that asks for more is not asked again.
        jitter: delays are stretched by a random factor in [1, 1 + jitter].
    """

    attempts: int = 4
    base_seconds: float = 0.1
    max_seconds: float = 10.0
    jitter: float = 0.25

    def delay(
        self, error: errors.DynSplitError, tries: int, repeatable: bool, left: float | None
    ) -> float | None:
        """Seconds until the next try; None = let the error out.

        Args:
            error: of the last try.
            tries: made so far, >= 1.
            repeatable: the call may run twice.
            left: seconds of the call's deadline left; None = no deadline.
        """
        if tries >= self.attempts:
            return None
        if error.retry_after_seconds is not None:
            wait = error.retry_after_seconds
        elif repeatable and isinstance(error, errors.UnavailableError):
            wait = self.base_seconds * 2 ** (tries - 1)
        else:
            return None
        if wait > self.max_seconds:
            return None
        wait *= 1 + self.jitter * random.random()
        return None if left is not None and wait >= left else wait


class Attempts:
    """The tries of one call under its deadline."""

    def __init__(self, retry: Retry, repeatable: bool, timeout_seconds: float | None) -> None:
        """Begins the first try."""
        self._retry, self._repeatable, self._tries = retry, repeatable, 1
        self._end = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def left(self) -> float | None:
        """Seconds left, for the try's own deadline; None = no limit."""
        return None if self._end is None else max(0.001, self._end - time.monotonic())

    def wait_after(self, error: errors.DynSplitError, *, again: bool = False) -> float:
        """Seconds to wait before the next try.

        Args:
            error: of the last try.
            again: the cause has been removed: at once, as long as there are tries left.

        Raises:
            DynSplitError: the error, where there is none.
        """
        delay = self._retry.delay(error, self._tries, self._repeatable, self.left())
        if again and self._tries < max(2, self._retry.attempts):
            delay = 0.0
        if delay is None:
            raise error from None
        self._tries += 1
        return delay


@dataclasses.dataclass(frozen=True)
class SessionRows:
    """How rows of a session look."""

    num_kv_heads: int
    head_dim: int
    key_dtype: np.dtype[Any]
    value_dtype: np.dtype[Any]


@dataclasses.dataclass
class Context:
    """What operations know of their client."""

    tenant: str
    on_error: OnError = "raise"
    rows: dict[str, SessionRows] = dataclasses.field(default_factory=dict)
    """Of sessions opened by this client."""


@dataclasses.dataclass(frozen=True)
class Unary(Generic[T]):
    """A call of one message and one answer."""

    service: str
    method: str
    request: Any
    finish: Callable[[Any], T]
    repeatable: bool = False


@dataclasses.dataclass(frozen=True)
class Stream(Generic[T]):
    """A call of compression.proto's grammar."""

    service: str
    method: str
    begin: compression_pb2.Begin
    inputs: Sequence[streams.Input]
    finish: Callable[[streams.Results], T]
    repeatable: bool = False
    passthrough: Callable[[errors.DynSplitError], T] | None = None
    """Stands for the result where the service is away; None = errors are raised."""
    resume: Callable[[streams.Conversation], compression_pb2.Begin] | None = None
    """Makes the begin that goes on where a broken call stopped."""
    timeout_seconds: float | None = None
    """Deadline of this call; None = the client's."""
    on_layer: Callable[[streams.Results, Any], None] | None = None
    """Takes each LayerResult once all of it is in the results; anew in every try."""


Call = Unary[T] | Stream[T]


class Face:
    """Name, documentation and signature of an operation, as callers of the client see it."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """Of the function that makes the call."""
        self._name = make.__name__
        text = inspect.getdoc(make) or ""
        self._doc = re.sub(r" *context: of the client\.\n", "", text).replace("Args:\n\n", "")
        signature = inspect.signature(make)
        context, *rest = signature.parameters.values()
        answer = re.sub(r"^(Unary|Stream)\[(.*)\]$", r"\2", str(signature.return_annotation))
        self._bound = inspect.Signature(rest, return_annotation=answer)
        first = context.replace(name="self", annotation=inspect.Parameter.empty)
        self._unbound = inspect.Signature([first, *rest], return_annotation=answer)

    def put_on(self, method: Any, *, bound: bool) -> Any:
        """The method, with this face."""
        method.__name__, method.__doc__ = self._name, self._doc
        method.__qualname__ = f"Client.{self._name}"
        method.__signature__ = self._bound if bound else self._unbound
        return method


ChannelOptions = list[tuple[str, int]]


def channel_options(target: str) -> ChannelOptions:
    """Of a connection to `target`: messages of any size, a connection of its own for each channel.

    On one host small windows bound what a slow reader makes the other side hold; across hosts
    gRPC's own measuring of the link is faster.
    """
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_local(target):
        options += [("grpc.http2.bdp_probe", 0), ("grpc.http2.max_frame_size", 1 << 20)]
    return options


DEFAULT_TARGETS = ("unix:/run/dynsplitd.sock", "127.0.0.1:8001")
_LOCAL_HOSTS = ("127.", "localhost", "[::1]", "0.0.0.0")


def choose_target(target: str | Sequence[str] | None, road: Road) -> str:
    """The address to connect to.

    Args:
        target: "host:port", "unix:/path", or several of them to choose from; None = the environment
            variable DYNSPLIT_TARGET (comma between addresses), else where dynsplitd listens by
            default. Unix sockets that exist come first.
        road: "unix" and "tcp" leave only addresses of that kind.

    Raises:
        ValueError: no address is left.
    """
    if target is None:
        target = os.environ.get("DYNSPLIT_TARGET", ",".join(DEFAULT_TARGETS)).split(",")
    candidates = [target] if isinstance(target, str) else list(target)
    if road in ("unix", "tcp"):
        candidates = [c for c in candidates if c.startswith("unix:") == (road == "unix")]
    if not candidates:
        raise ValueError(f"no address of {target!r} is for road {road!r}")
    there = [c for c in candidates if c.startswith("unix:") and Path(c[5:]).exists()]
    others = [c for c in candidates if not c.startswith("unix:")]
    return next(iter([*there, *others, *candidates]))


def is_local(target: str) -> bool:
    """Whether the address is certainly of this host, so that memory may be shared."""
    return target.startswith(("unix:", *_LOCAL_HOSTS))
