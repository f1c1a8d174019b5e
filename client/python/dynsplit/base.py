# SPDX-License-Identifier: Apache-2.0
"""What the blocking client and the one for asyncio have in common: options, channels, stubs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dynsplit import calls, session_calls, streams
from dynsplit.calls import Context, OnError, Retry, Road, Stream
from dynsplit.memory import RegionOwner
from dynsplit.roads import Stage
from dynsplit.v1 import (
    compression_pb2,
    compression_pb2_grpc,
    info_pb2,
    info_pb2_grpc,
    memory_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
)

if TYPE_CHECKING:
    from dynsplit.engine import Engine

_STREAMS = {
    "Compression": ("Compress", "Plan", "Apply", "Calibrate"),
    "Sessions": ("Open", "Append", "Fetch"),
}
_MAX_CHANNELS = 64
_MAX_SHARDS = 16
_MIN_SHARD_BYTES = 4 << 20  # fewer are not worth another stream
_SERVING = b"\x08\x01"  # HealthCheckResponse {status: SERVING}


class BaseClient:
    """Options and connections. `dynsplit.Client` and `dynsplit.aio.Client` run calls over them."""

    def __init__(
        self,
        target: Any = None,
        *,
        tenant: str = "",
        timeout_seconds: float | None = 60.0,
        stream_timeout_seconds: float | None = 300.0,
        road: Road = "auto",
        retry: Retry | None = None,
        on_error: OnError = "raise",
        engine: Engine | None = None,
        region_socket: str = "",
        num_channels: int = 1,
        chunk_bytes: int = 2 << 20,
        max_open_layers: int = 0,
        max_result_bytes: int = 64 << 30,
        credentials: Any = None,
    ) -> None:
        """Connects lazily.

        Args:
            target: "host:port", "unix:/path", several of these to choose from, or a channel (of
                grpc, for asyncio of grpc.aio), which then stays the caller's. None =
                $DYNSPLIT_TARGET, else where dynsplitd listens by default.
            tenant: quota and fairness group; empty = "default".
            timeout_seconds: deadline of each unary call with all its tries; None = none.
            stream_timeout_seconds: likewise of the streams (compress, plan, apply, calibrate, open,
                append, fetch).
            road: how tensors reach the server; see `Road`.
            retry: None = `Retry()`.
            on_error: "passthrough" makes `compress` return the caller's tensors where the service
                is away.
            engine: makes road "cuda-ipc" possible for torch tensors on the server's GPU.
            region_socket: path of the server's side socket (its option --region-socket): shared
                memory is then sealed and has no name (road "memfd").
            num_channels: connections that calls are spread over, in [1, 64]. A stream with much to
                send (4 MiB a connection and more), and every `fetch`, is itself spread, where the
                server takes that. 1 is best on the server's host, 4 across hosts.
            chunk_bytes: data of one chunk, sent and asked for, in [4096, 3 MiB]; the server may
                demand less.
            max_open_layers: layers of a streamed request that the server has room for at a time;
                0 = 2, or what `num_channels` needs.
            max_result_bytes: most tensor bytes accepted in one answer (ExhaustedError).
            credentials: grpc.ChannelCredentials for TLS; None = none.

        Raises:
            ValueError: no address fits the road, or an option is out of its range.
        """
        if not 1 <= num_channels <= _MAX_CHANNELS:
            raise ValueError(f"num_channels is {num_channels}; must be in [1, {_MAX_CHANNELS}]")
        self._context = Context(tenant, on_error)
        self._timeout = timeout_seconds
        self._stream_timeout = stream_timeout_seconds
        self._retry = retry or Retry()
        self._wire = streams.Wire(chunk_bytes, max_open_layers, max_result_bytes)
        self._capabilities: info_pb2.Capabilities | None = None
        self._owner: RegionOwner | None = None  # of the segments that calls are staged in
        self._owner_mu: Any = self._new_lock()
        self._ownerless = False  # the server has no owners
        self.target = ""
        """The address; empty where a channel was given."""
        self._owned: list[Any] = []
        if target is None or isinstance(target, str | list | tuple):
            self.target = calls.choose_target(target, road)
            options = calls.channel_options(self.target)
            self._owned = [
                self._connect(self.target, credentials, options) for _ in range(num_channels)
            ]
        elif num_channels != 1:
            raise ValueError("num_channels is for addresses, not for a channel that is given")
        self._stage = Stage(road, self.target, engine, region_socket)
        self._channels: list[Any] = self._owned or [target]
        self._stubs = [_stubs_of(channel) for channel in self._channels]
        self._turn = itertools.count()

    _new_lock: Callable[[], Any]

    @staticmethod
    def _connect(address: str, credentials: Any, options: calls.ChannelOptions) -> Any:
        raise NotImplementedError

    def select_request(self, steps: Sequence[session_calls.Step]) -> sessions_pb2.SelectRequest:
        """The message of `select`, for `select_message`."""
        return session_calls.select_request(self._context, steps)

    def _methods(self, service: str, method: str, count: int = 1) -> list[Any]:
        """A method of so many connections side by side."""
        first = next(self._turn)
        stubs = [self._stubs[(first + i) % len(self._stubs)] for i in range(count)]
        return [getattr(stub[service], method) for stub in stubs]

    def _wanted_shards(self, call: Stream[Any], inputs: Sequence[streams.Input]) -> int:
        """Streams that the call is worth, whatever the server takes."""
        # What Fetch brings back is not known here, but is why it is called.
        worth = _MAX_SHARDS
        if call.method != "Fetch":
            worth = streams.streamed_bytes(inputs) // _MIN_SHARD_BYTES
        return max(1, min(len(self._stubs), worth, _MAX_SHARDS))


def _stubs_of(channel: Any) -> dict[str, Any]:
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
    """Whether a HealthCheckResponse says SERVING."""
    return answer == _SERVING
