# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio: `dynsplit.Client` with its calls awaited.

    async with dynsplit.aio.Client("unix:/run/dynsplitd.sock") as client:
        results = await asyncio.gather(*(client.compress(*sequence) for sequence in sequences))

Arguments, results, errors, roads and retries are those of `dynsplit.Client`; cancelling a task
cancels its call. A client belongs to the event loop it is first used in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
import grpc.aio

from dynsplit import calls, compression, errors, info, session_calls, streams
from dynsplit.calls import Attempts, Call, Context, OnError, Retry, Road, Stream, Unary
from dynsplit.client import CHANNEL_OPTIONS, health_call, is_serving, stubs_of
from dynsplit.roads import CANNOT_SHARE, Segment, Stage
from dynsplit.v1 import sessions_pb2

if TYPE_CHECKING:
    from dynsplit.engine import Engine

P = ParamSpec("P")
T = TypeVar("T")


class AsyncMethod(Generic[P, T]):
    """An operation as a method that is awaited."""

    def __init__(self, make: Callable[Concatenate[Context, P], Call[T]]) -> None:
        """Of a function that makes the call."""
        self._make, self._face = make, calls.Face(make)

    @overload
    def __get__(
        self, client: None, owner: type
    ) -> Callable[Concatenate[Client, P], Awaitable[T]]: ...

    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Awaitable[T]]: ...

    def __get__(self, client: Client | None, owner: type) -> Any:
        """Bound to a client, or a function of one."""

        async def unbound(of: Client, *args: P.args, **kwargs: P.kwargs) -> T:
            return await of._run(self._make(of._context, *args, **kwargs))

        if client is None:
            return self._face.put_on(unbound, bound=False)

        async def method(*args: P.args, **kwargs: P.kwargs) -> T:
            return await client._run(self._make(client._context, *args, **kwargs))

        return self._face.put_on(method, bound=True)


class Client:
    """Everything the service does, for asyncio; see `dynsplit.Client`."""

    def __init__(
        self,
        target: str | Sequence[str] | grpc.aio.Channel | None = None,
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
        """Connects lazily; arguments as of `dynsplit.Client`, a channel being one of grpc.aio."""
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
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        await self.close()

    async def close(self) -> None:
        """Gives shared memory back, and closes a channel made here. Sessions live on."""
        for place in self._stage.close():
            with contextlib.suppress(errors.DynSplitError):  # its lease ends anyhow
                await self.unregister_region(place.name, place.generation)
        if self._owned is not None:
            await self._owned.close()

    compress = AsyncMethod(compression.compress)
    plan = AsyncMethod(compression.plan)
    apply = AsyncMethod(compression.apply)
    calibrate = AsyncMethod(compression.calibrate)

    open = AsyncMethod(session_calls.open)
    append = AsyncMethod(session_calls.append)
    select = AsyncMethod(session_calls.select)
    select_message = AsyncMethod(session_calls.select_message)
    fetch = AsyncMethod(compression.fetch)
    renew = AsyncMethod(session_calls.renew)
    release = AsyncMethod(session_calls.release)
    get = AsyncMethod(session_calls.get)
    map = AsyncMethod(session_calls.map)
    unmap = AsyncMethod(session_calls.unmap)
    session_bytes = AsyncMethod(session_calls.session_bytes)

    register_region = AsyncMethod(session_calls.register_region)
    unregister_region = AsyncMethod(session_calls.unregister_region)
    regions = AsyncMethod(session_calls.regions)

    server_info = AsyncMethod(info.server_info)
    policies = AsyncMethod(info.policies)
    profiles = AsyncMethod(info.profiles)
    profile = AsyncMethod(info.profile)
    put_profile = AsyncMethod(info.put_profile)
    advise = AsyncMethod(info.advise)

    def select_request(self, steps: Sequence[session_calls.Step]) -> sessions_pb2.SelectRequest:
        """The message of `select`, for `select_message`."""
        return session_calls.select_request(self._context, steps)

    async def healthy(self) -> bool:
        """Whether the server says that it serves; False also where there is none."""
        try:
            return is_serving(await health_call(self._channel)(b"", timeout=self._timeout))
        except grpc.RpcError:
            return False

    # -- running --

    async def _run(self, call: Call[T]) -> T:
        if isinstance(call, Unary):
            return call.finish(await self._unary(call))
        try:
            results = await self._stream(call)
        except errors.AWAY as error:
            if call.passthrough is None:
                raise
            return call.passthrough(error)
        return call.finish(results)

    async def _unary(self, call: Unary[T], retry: Retry | None = None) -> Any:
        method = getattr(self._stubs[call.service], call.method)
        attempts = Attempts(retry or self._retry, call.repeatable, self._timeout)
        while True:
            try:
                return await method(call.request, timeout=attempts.left())
            except grpc.RpcError as error:
                wait = attempts.wait_after(errors.from_rpc_error(error))
            await asyncio.sleep(wait)

    async def _stream(self, call: Stream[T]) -> streams.Results:
        method = getattr(self._stubs[call.service], call.method)
        timeout = self._stream_timeout if call.timeout_seconds is None else call.timeout_seconds
        attempts = Attempts(self._retry, call.repeatable, timeout)
        begin, broken = call.begin, None
        while True:
            async with self._staged(call) as (inputs, segment):
                talk = streams.Conversation(begin, inputs)
                if broken is not None:
                    talk.carry_on(broken)
                try:
                    results = await streams.converse_async(method, talk, attempts.left())
                    results.road = self._stage.inline if segment is None else segment.kind
                    return results
                except errors.DynSplitError as error:
                    lost = segment is not None and segment.lost_by(error)
                    wait = attempts.wait_after(error, again=lost)
            if call.resume is not None:
                begin, broken = call.resume(talk), talk
            await asyncio.sleep(wait)

    @contextlib.asynccontextmanager
    async def _staged(
        self, call: Stream[T]
    ) -> AsyncIterator[tuple[Sequence[streams.Input], Segment | None]]:
        """The call's inputs on the road that was chosen for them."""
        kind = None
        if self._stage.needs_planes(call.inputs):
            kind = self._stage.choose(call.inputs, await self._data_planes())
        if kind is None:
            yield [entry.on_host() for entry in call.inputs], None
            return
        segment = None
        try:
            segment = self._stage.acquire(kind, call.inputs)
            registration = segment.registration(self._context)
            if registration is not None:
                segment.registered(await self._run(registration))
        except (*CANNOT_SHARE, OSError):
            if segment is not None:
                segment.close()
            if not self._stage.failed(kind):
                raise
        else:
            try:
                yield await asyncio.to_thread(segment.fill, call.inputs), segment
            finally:
                self._stage.release(segment)
            return
        yield [entry.on_host() for entry in call.inputs], None

    async def _data_planes(self) -> list[int]:
        if self._planes is None:
            try:
                answer = await self._unary(info.server_info(self._context), Retry(attempts=1))
                self._planes = list(answer.capabilities.data_planes)
            except errors.UnsupportedError:  # a server without the Info service
                self._planes = []
            except errors.AWAY:
                if self._stage.forced:
                    raise
                return []  # the call itself will say so, if it is still true
        return self._planes
