# SPDX-License-Identifier: Apache-2.0
"""The blocking client. `dynsplit.aio` has the same one for asyncio."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import grpc

from dynsplit import calls, compression, errors, info, memory, session_calls, streams
from dynsplit.base import BaseClient, health_call, is_serving
from dynsplit.calls import Attempts, Call, Context, Retry, Stream, Unary
from dynsplit.memory import OpenStream, RegionOwner
from dynsplit.roads import CANNOT_SHARE, Segment
from dynsplit.v1 import info_pb2

P = ParamSpec("P")
T = TypeVar("T")

_ATTACH_SECONDS = 60.0  # where calls have no deadline


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


class Client(BaseClient):
    """Everything the service does. Thread-safe; calls block their thread.

    Every method raises classes of `dynsplit.errors`. Calls are repeated as `Retry` says, within
    their deadline.

        with dynsplit.Client("unix:/run/dynsplitd.sock") as client:
            result = client.compress(token_ids, keys, values, queries=queries, policy="snapkv")
            for layer in result.layers:
                layer.tokens, layer.rows()
    """

    _new_lock = staticmethod(threading.Lock)

    @staticmethod
    def _connect(address: str, credentials: Any, options: calls.ChannelOptions) -> Any:
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

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
        """Gives shared memory back, and closes connections made here. Sessions live on."""
        self._discard(self._stage.close())
        if self._owner is not None:
            self._owner.close()
        for channel in self._owned:
            channel.close()

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

    register_region = Method(memory.register_region)
    unregister_region = Method(memory.unregister_region)
    regions = Method(memory.regions)

    server_info = Method(info.server_info)
    policies = Method(info.policies)
    profiles = Method(info.profiles)
    profile = Method(info.profile)
    put_profile = Method(info.put_profile)
    advise = Method(info.advise)

    def attach(self) -> RegionOwner:
        """Makes an owner of regions: they go with it, or with this process, at once.

        Holds a stream to the server open.

            with client.attach() as owner, HostRegion(client, byte_size, owner=owner) as region: ...

        Raises:
            ExhaustedError: the server's quota of owners.
            UnsupportedError: the server shares no memory.
            DeadlineError, UnavailableError: it does not answer in time, or at all.
        """
        silence = OpenStream()
        call = self._methods("Memory", "Attach")[0](iter(silence))
        if not call.add_callback(silence.end):
            silence.end()
        limit = threading.Timer(self._timeout or _ATTACH_SECONDS, call.cancel)
        limit.start()
        try:
            return RegionOwner(next(call).owner, call, silence.end)
        except StopIteration:
            raise errors.UnavailableError("the owner's stream ended", code="UNAVAILABLE") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise errors.DeadlineError(
                    "the server did not answer Attach", code="DEADLINE_EXCEEDED"
                ) from None
            raise errors.from_rpc_error(error) from None
        finally:
            limit.cancel()

    def healthy(self) -> bool:
        """Whether the server says that it serves; False also where there is none."""
        try:
            return is_serving(health_call(self._channels[0])(b"", timeout=self._timeout))
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
        method = self._methods(call.service, call.method)[0]
        attempts = Attempts(retry or self._retry, call.repeatable, self._timeout)
        while True:
            try:
                return method(call.request, timeout=attempts.left())
            except grpc.RpcError as error:
                wait = attempts.wait_after(errors.from_rpc_error(error))
            time.sleep(wait)

    def _stream(self, call: Stream[T]) -> streams.Results:
        timeout = self._stream_timeout if call.timeout_seconds is None else call.timeout_seconds
        attempts = Attempts(self._retry, call.repeatable, timeout)
        begin, broken, talk = call.begin, None, None
        while True:
            lost = False
            try:
                with self._staged(call) as (inputs, segment):
                    shards = self._num_shards(call, inputs)
                    talk = streams.Conversation(begin, inputs, self._wire, shards, call.on_layer)
                    if broken is not None:
                        talk.carry_on(broken)
                    methods = self._methods(call.service, call.method, shards)
                    try:
                        results = streams.converse(methods, talk, attempts.left())
                    except errors.DynSplitError as error:
                        lost = segment is not None and segment.lost_by(error)
                        raise
                    results.road = self._stage.inline if segment is None else segment.kind
                    return results
            except errors.DynSplitError as error:
                wait = attempts.wait_after(error, again=lost)
            if call.resume is not None and talk is not None:
                begin, broken = call.resume(talk), talk
            time.sleep(wait)

    def _num_shards(self, call: Stream[T], inputs: Sequence[streams.Input]) -> int:
        wanted = self._wanted_shards(call, inputs)
        return wanted if wanted == 1 else max(1, min(wanted, self._server_has().max_shards))

    @contextlib.contextmanager
    def _staged(self, call: Stream[T]) -> Iterator[tuple[Sequence[streams.Input], Segment | None]]:
        """The call's inputs on the road that was chosen for them."""
        kinds = []
        if self._stage.needs_planes(call.inputs):
            kinds = self._stage.choose(call.inputs, self._server_has().data_planes)
        for kind in kinds:
            segment = self._shared(kind, call.inputs)
            if segment is None:
                continue
            try:
                yield segment.fill(call.inputs), segment
            finally:
                self._discard(self._stage.release(segment))
            return
        yield streams.on_host(call.inputs), None

    def _shared(self, kind: str, inputs: Sequence[streams.Input]) -> Segment | None:
        """A registered segment for the inputs; None where the next road is to be tried."""
        segment = None
        try:
            segment = self._stage.acquire(kind, inputs)
            registration = segment.registration(self._context, self._owner_token())
            if registration is not None:
                segment.registered(self._run(registration))
            return segment
        except CANNOT_SHARE as error:
            if segment is not None:
                self._discard([segment])
            # An owner that is gone says nothing about the memory.
            owned = self._owner is None or self._owner.attached
            self._stage.failed(kind, error, for_good=owned)
            return None

    def _discard(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if segment.place is not None:
                with contextlib.suppress(errors.DynSplitError):  # its lease ends anyhow
                    self.unregister_region(segment.place.name, segment.place.generation)
            segment.memory.close()

    def _owner_token(self) -> bytes:
        """Of the owner of this client's segments; empty where the server has none."""
        with self._owner_mu:
            if not self._ownerless and (self._owner is None or not self._owner.attached):
                try:
                    self._owner = self.attach()
                except (errors.UnsupportedError, errors.ExhaustedError):
                    self._owner, self._ownerless = None, True
            return b"" if self._owner is None else self._owner.token

    def _server_has(self) -> info_pb2.Capabilities:
        if self._capabilities is None:
            try:
                answer = self._unary(info.server_info(self._context), Retry(attempts=1))
                self._capabilities = answer.capabilities
            except errors.UnsupportedError:  # a server without the Info service
                self._capabilities = info_pb2.Capabilities()
            except errors.AWAY:
                if self._stage.forced:
                    raise
                return info_pb2.Capabilities()  # the call itself will say so, if still true
        return self._capabilities
