# SPDX-License-Identifier: Apache-2.0
"""The blocking client. `dynsplit.aio` has the same one for asyncio."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    overload,
)

import grpc

from dynsplit import calls, compression, errors, info, session_calls, streams
from dynsplit.calls import Attempts, Call, Context, OnError, Retry, Road, Stream, Unary
from dynsplit.roads import CANNOT_SHARE, Segment, Stage
from dynsplit.v1 import (
    compression_pb2,
    compression_pb2_grpc,
    info_pb2_grpc,
    memory_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)

if TYPE_CHECKING:
    from dynsplit.engine import Engine

P = ParamSpec("P")
T = TypeVar("T")

_STREAMS = {
    "Compression": ("Compress", "Plan", "Apply", "Calibrate"),
    "Sessions": ("Open", "Append", "Fetch"),
}
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class Method(Generic[P, T]):
    """An operation as a method of the client."""

    def __init__(self, make: Callable[Concatenate[Context, P], Call[T]]) -> None:
        """Of a function that makes the call."""
        self._make, self._face = make, calls.Face(make)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[Concatenate[Client, P], T]: ...

    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...

    def __get__(self, client: Client | None, owner: type) -> Any:
        """Bound to a client, or a function of one."""

        def unbound(of: Client, *args: P.args, **kwargs: P.kwargs) -> T:
            return of._run(self._make(of._context, *args, **kwargs))

        if client is None:
            return self._face.put_on(unbound, bound=False)

        def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return client._run(self._make(client._context, *args, **kwargs))

        return self._face.put_on(method, bound=True)


def stubs_of(channel: Any) -> dict[str, Any]:
    """Stubs of all services by name; also of a grpc.aio channel."""
    classes: dict[str, Any] = {  # generated without annotations
        "Compression": compression_pb2_grpc.CompressionStub,
        "Sessions": sessions_pb2_grpc.SessionsStub,
        "Memory": memory_pb2_grpc.MemoryStub,
        "Info": info_pb2_grpc.InfoStub,
    }
    stubs = {name: stub(channel) for name, stub in classes.items()}
    for service, methods in _STREAMS.items():
        for method in methods:
            call = channel.stream_stream(
                f"/dynsplit.v1.{service}/{method}",
                request_serializer=streams.serialize,
                response_deserializer=compression_pb2.CompressResponse.FromString,
            )
            setattr(stubs[service], method, call)
    return stubs


def health_call(channel: Any) -> Any:
    """grpc.health.v1 Check of the whole server: bytes to bytes."""
    return channel.unary_unary("/grpc.health.v1.Health/Check")


def is_serving(answer: bytes) -> bool:
    """Whether a HealthCheckResponse says SERVING (field 1, value 1)."""
    return answer == b"\x08\x01"


class Client:
    """Everything the service does. Thread-safe; calls block their thread.

    Every method raises classes of `dynsplit.errors`. Calls are repeated as `Retry` says, within
    their deadline.

        with dynsplit.Client("unix:/run/dynsplitd.sock") as client:
            result = client.compress(token_ids, keys, values, queries=queries, policy="snapkv")
            for layer in result.layers:
                layer.tokens, layer.rows()
    """

    def __init__(
        self,
        target: str | Sequence[str] | grpc.Channel | None = None,
        *,
        tenant: str = "",
        timeout_seconds: float | None = 60.0,
        stream_timeout_seconds: float | None = 300.0,
        road: Road = "auto",
        retry: Retry | None = None,
        on_error: OnError = "raise",
        engine: Engine | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connects lazily.

        Args:
            target: "host:port", "unix:/path", several of these to choose from, or a channel (which
                then stays the caller's). None = $DYNSPLIT_TARGET, else where dynsplitd listens by
                default.
            tenant: quota and fairness group; empty = "default".
            timeout_seconds: deadline of each unary call with all its tries; None = none.
            stream_timeout_seconds: likewise of the streams (compress, plan, apply, calibrate, open,
                append, fetch).
            road: how tensors reach the server; see `Road`.
            retry: None = `Retry()`.
            on_error: "passthrough" makes `compress` return the caller's tensors where the service
                is away.
            engine: makes road "cuda-ipc" possible for torch tensors on the server's GPU.
            credentials: TLS; None = none.

        Raises:
            ValueError: no address fits the road.
        """
        address = ""
        self._owned: Any = None
        if target is None or isinstance(target, str | list | tuple):
            address = calls.choose_target(target, road)
            target = self._owned = self._connect(address, credentials)
        self._channel: Any = target
        self._context = Context(tenant, on_error)
        self._timeout = timeout_seconds
        self._stream_timeout = stream_timeout_seconds
        self._retry = retry or Retry()
        self._stage = Stage(road, address, engine)
        self._planes: list[int] | None = None
        self._stubs = stubs_of(target)
        self.target = address
        """The address; empty where a channel was given."""

    @staticmethod
    def _connect(address: str, credentials: grpc.ChannelCredentials | None) -> Any:
        if credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()

    def close(self) -> None:
        """Gives shared memory back, and closes a channel made here. Sessions live on."""
        for place in self._stage.close():
            with contextlib.suppress(errors.DynSplitError):  # its lease ends anyhow
                self.unregister_region(place.name, place.generation)
        if self._owned is not None:
            self._owned.close()

    compress = Method(compression.compress)
    plan = Method(compression.plan)
    apply = Method(compression.apply)
    calibrate = Method(compression.calibrate)

    open = Method(session_calls.open)
    append = Method(session_calls.append)
    select = Method(session_calls.select)
    select_message = Method(session_calls.select_message)
    fetch = Method(compression.fetch)
    renew = Method(session_calls.renew)
    release = Method(session_calls.release)
    get = Method(session_calls.get)
    map = Method(session_calls.map)
    unmap = Method(session_calls.unmap)
    session_bytes = Method(session_calls.session_bytes)

    register_region = Method(session_calls.register_region)
    unregister_region = Method(session_calls.unregister_region)
    regions = Method(session_calls.regions)

    server_info = Method(info.server_info)
    policies = Method(info.policies)
    profiles = Method(info.profiles)
    profile = Method(info.profile)
    put_profile = Method(info.put_profile)
    advise = Method(info.advise)

    def select_request(self, steps: Sequence[session_calls.Step]) -> sessions_pb2.SelectRequest:
        """The message of `select`, for `select_message`."""
        return session_calls.select_request(self._context, steps)

    def healthy(self) -> bool:
        """Whether the server says that it serves; False also where there is none."""
        try:
            return is_serving(health_call(self._channel)(b"", timeout=self._timeout))
        except grpc.RpcError:
            return False

    # -- running --

    def _run(self, call: Call[T]) -> T:
        if isinstance(call, Unary):
            return call.finish(self._unary(call))
        try:
            results = self._stream(call)
        except errors.AWAY as error:
            if call.passthrough is None:
                raise
            return call.passthrough(error)
        return call.finish(results)

    def _unary(self, call: Unary[T], retry: Retry | None = None) -> Any:
        method = getattr(self._stubs[call.service], call.method)
        attempts = Attempts(retry or self._retry, call.repeatable, self._timeout)
        while True:
            try:
                return method(call.request, timeout=attempts.left())
            except grpc.RpcError as error:
                wait = attempts.wait_after(errors.from_rpc_error(error))
            time.sleep(wait)

    def _stream(self, call: Stream[T]) -> streams.Results:
        method = getattr(self._stubs[call.service], call.method)
        timeout = self._stream_timeout if call.timeout_seconds is None else call.timeout_seconds
        attempts = Attempts(self._retry, call.repeatable, timeout)
        begin, broken = call.begin, None
        while True:
            with self._staged(call) as (inputs, segment):
                talk = streams.Conversation(begin, inputs)
                if broken is not None:
                    talk.carry_on(broken)
                try:
                    results = streams.converse(method, talk, attempts.left())
                    results.road = self._stage.inline if segment is None else segment.kind
                    return results
                except errors.DynSplitError as error:
                    lost = segment is not None and segment.lost_by(error)
                    wait = attempts.wait_after(error, again=lost)
            if call.resume is not None:
                begin, broken = call.resume(talk), talk
            time.sleep(wait)

    @contextlib.contextmanager
    def _staged(self, call: Stream[T]) -> Iterator[tuple[Sequence[streams.Input], Segment | None]]:
        """The call's inputs on the road that was chosen for them."""
        kind = None
        if self._stage.needs_planes(call.inputs):
            kind = self._stage.choose(call.inputs, self._data_planes())
        if kind is None:
            yield [entry.on_host() for entry in call.inputs], None
            return
        segment = None
        try:
            segment = self._stage.acquire(kind, call.inputs)
            registration = segment.registration(self._context)
            if registration is not None:
                segment.registered(self._run(registration))
        except (*CANNOT_SHARE, OSError):
            if segment is not None:
                segment.close()
            if not self._stage.failed(kind):
                raise
        else:
            try:
                yield segment.fill(call.inputs), segment
            finally:
                self._stage.release(segment)
            return
        yield [entry.on_host() for entry in call.inputs], None

    def _data_planes(self) -> list[int]:
        if self._planes is None:
            try:
                answer = self._unary(info.server_info(self._context), Retry(attempts=1))
                self._planes = list(answer.capabilities.data_planes)
            except errors.UnsupportedError:  # a server without the Info service
                self._planes = []
            except errors.AWAY:
                if self._stage.forced:
                    raise
                return []  # the call itself will say so, if it is still true
        return self._planes
