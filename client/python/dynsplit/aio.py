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
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import grpc
import grpc.aio

from dynsplit import calls, compression, errors, info, memory, session_calls, streams
from dynsplit.base import BaseClient, health_call, is_serving
from dynsplit.calls import Attempts, Call, Context, Retry, Stream, Unary
from dynsplit.memory import RegionOwner, Shareable
from dynsplit.roads import CANNOT_SHARE, Segment
from dynsplit.shared import region_name
from dynsplit.tensors import Array, DeviceTensor, RegionSlice
from dynsplit.v1 import info_pb2

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
    ) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]: ...

    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, client: Client | None, owner: type) -> Any:
        """Bound to a client, or a function of one."""

        # The call is made here and now, not when it is awaited: tensors on a GPU are ready in the
        # stream that is current here.
        def unbound(of: Client, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            return of._run(self._make(of._context, *args, **kwargs))

        if client is None:
            return self._face.put_on(unbound, bound=False)

        def method(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            return client._run(self._make(client._context, *args, **kwargs))

        return self._face.put_on(method, bound=True)


class Client(BaseClient):
    """Everything the service does, for asyncio; see `dynsplit.Client`."""

    _new_lock = staticmethod(asyncio.Lock)

    @staticmethod
    def _connect(address: str, credentials: Any, options: calls.ChannelOptions) -> Any:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

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
        """Gives shared memory back, and closes connections made here. Sessions live on."""
        await self._discard(self._stage.close())
        if self._owner is not None:
            self._owner.close()
        for channel in self._owned:
            await channel.close()

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

    register_region = AsyncMethod(memory.register_region)
    unregister_region = AsyncMethod(memory.unregister_region)
    regions = AsyncMethod(memory.regions)

    server_info = AsyncMethod(info.server_info)
    policies = AsyncMethod(info.policies)
    profiles = AsyncMethod(info.profiles)
    profile = AsyncMethod(info.profile)
    put_profile = AsyncMethod(info.put_profile)
    advise = AsyncMethod(info.advise)

    async def attach(self) -> RegionOwner:
        """As of `dynsplit.Client.attach`; the owner is closed without waiting."""
        call = self._methods("Memory", "Attach")[0]()
        try:
            answer = await asyncio.wait_for(call.read(), self._timeout)
        except TimeoutError:
            raise errors.DeadlineError(
                "the server did not answer Attach", code="DEADLINE_EXCEEDED"
            ) from None
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
        if answer is grpc.aio.EOF:
            raise errors.UnavailableError("the owner's stream ended", code="UNAVAILABLE")
        return RegionOwner(answer.owner, call)

    async def healthy(self) -> bool:
        """Whether the server says that it serves; False also where there is none."""
        try:
            return is_serving(await health_call(self._channels[0])(b"", timeout=self._timeout))
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
        method = self._methods(call.service, call.method)[0]
        attempts = Attempts(retry or self._retry, call.repeatable, self._timeout)
        while True:
            try:
                return await method(call.request, timeout=attempts.left())
            except grpc.RpcError as error:
                wait = attempts.wait_after(errors.from_rpc_error(error))
            await asyncio.sleep(wait)

    async def _stream(self, call: Stream[T]) -> streams.Results:
        timeout = self._stream_timeout if call.timeout_seconds is None else call.timeout_seconds
        attempts = Attempts(self._retry, call.repeatable, timeout)
        begin, broken, talk = call.begin, None, None
        while True:
            lost = False
            try:
                async with self._staged(call) as (inputs, segment):
                    shards = await self._num_shards(call, inputs)
                    talk = streams.Conversation(begin, inputs, self._wire, shards, call.on_layer)
                    if broken is not None:
                        talk.carry_on(broken)
                    methods = self._methods(call.service, call.method, shards)
                    try:
                        results = await streams.converse_async(methods, talk, attempts.left())
                    except errors.DynSplitError as error:
                        lost = segment is not None and segment.lost_by(error)
                        raise
                    results.road = self._stage.inline if segment is None else segment.kind
                    return results
            except errors.DynSplitError as error:
                wait = attempts.wait_after(error, again=lost)
            if call.resume is not None and talk is not None:
                begin, broken = call.resume(talk), talk
            await asyncio.sleep(wait)

    async def _num_shards(self, call: Stream[T], inputs: Sequence[streams.Input]) -> int:
        wanted = self._wanted_shards(call, inputs)
        if wanted == 1:
            return 1
        return max(1, min(wanted, (await self._server_has()).max_shards))

    @contextlib.asynccontextmanager
    async def _staged(
        self, call: Stream[T]
    ) -> AsyncIterator[tuple[Sequence[streams.Input], Segment | None]]:
        """The call's inputs on the road that was chosen for them."""
        kinds = []
        if self._stage.needs_planes(call.inputs):
            kinds = self._stage.choose(call.inputs, (await self._server_has()).data_planes)
        for kind in kinds:
            segment = await self._shared(kind, call.inputs)
            if segment is None:
                continue
            try:
                yield await asyncio.to_thread(segment.fill, call.inputs), segment
            finally:
                await self._discard(self._stage.release(segment))
            return
        yield await self._on_host(call.inputs), None

    @staticmethod
    async def _on_host(inputs: Sequence[streams.Input]) -> list[streams.Input]:
        """In a thread where that waits for a GPU."""
        if any(isinstance(entry.tensor, DeviceTensor) for entry in inputs):
            return await asyncio.to_thread(streams.on_host, inputs)
        return streams.on_host(inputs)

    async def _shared(self, kind: str, inputs: Sequence[streams.Input]) -> Segment | None:
        """A registered segment for the inputs; None where the next road is to be tried."""
        segment = None
        try:
            segment = self._stage.acquire(kind, inputs)
            registration = await asyncio.to_thread(
                segment.registration, self._context, await self._owner_token()
            )
            if registration is not None:
                segment.registered(await self._run(registration))
            return segment
        except CANNOT_SHARE as error:
            if segment is not None:
                await self._discard([segment])
            # An owner that is gone says nothing about the memory.
            owned = self._owner is None or self._owner.attached
            self._stage.failed(kind, error, for_good=owned)
            return None

    async def _discard(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if segment.place is not None:
                with contextlib.suppress(errors.DynSplitError):  # its lease ends anyhow
                    await self.unregister_region(segment.place.name, segment.place.generation)
            segment.memory.close()

    async def _owner_token(self) -> bytes:
        """Of the owner of this client's segments; empty where the server has none."""
        async with self._owner_mu:
            if not self._ownerless and (self._owner is None or not self._owner.attached):
                try:
                    self._owner = await self.attach()
                except (errors.UnsupportedError, errors.ExhaustedError):
                    self._owner, self._ownerless = None, True
            return b"" if self._owner is None else self._owner.token

    async def _server_has(self) -> info_pb2.Capabilities:
        if self._capabilities is None:
            try:
                answer = await self._unary(info.server_info(self._context), Retry(attempts=1))
                self._capabilities = answer.capabilities
            except errors.UnsupportedError:  # a server without the Info service
                self._capabilities = info_pb2.Capabilities()
            except errors.AWAY:
                if self._stage.forced:
                    raise
                return info_pb2.Capabilities()  # the call itself will say so, if still true
        return self._capabilities


class Region:
    """`dynsplit.shared.Region` for asyncio: memory registered with the server while it is open.

    async with aio.Region(client, SharedMemory(byte_size)) as region:
        ...  # region.memory.array(...), region.place
    """

    def __init__(
        self,
        client: Client,
        memory: Shareable,
        *,
        lease_seconds: int = 0,
        owner: RegionOwner | None = None,
    ) -> None:
        """Registers nothing yet; arguments as of `dynsplit.shared.Region`."""
        self._client, self.memory = client, memory
        self._terms: dict[str, Any] = {
            "writable": True,
            "lease_seconds": lease_seconds,
            "owner": owner or b"",
        }
        self.place = RegionSlice("", 0)
        """Where the region begins, once it is open."""

    async def __aenter__(self) -> Self:
        """Registers; raises as `Client.register_region`."""
        try:
            await self._register(region_name(), renew=False)
        except BaseException:
            self.memory.close()
            raise
        return self

    async def renew(self) -> None:
        """Begins the lease again; before it has ended."""
        await self._register(self.place.name, renew=True)

    async def _register(self, name: str, *, renew: bool) -> None:
        source = await asyncio.to_thread(self.memory.source, renew=renew)
        self.place = await self._client.register_region(
            name, self.memory.byte_size, **source, **self._terms
        )

    def bytes_at(self, offset_bytes: int, byte_size: int) -> Array:
        """uint8 [byte_size], a view of the memory."""
        return self.memory.bytes_at(offset_bytes, byte_size)

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unregisters, then gives the memory back."""
        try:
            with contextlib.suppress(errors.NotFoundError):  # its lease or owner has ended
                await self._client.unregister_region(self.place.name, self.place.generation)
        finally:
            self.memory.close()
