# SPDX-License-Identifier: Apache-2.0
"""What a call can fail with: one exception class a status code that callers act upon.

    DynSplitError
    ├─ InvalidRequestError  INVALID_ARGUMENT     the request is wrong: see `violations`
    ├─ NotFoundError        NOT_FOUND            see `reason`: SESSION_EXPIRED and others
    ├─ ExistsError          ALREADY_EXISTS       a region or profile of that name
    ├─ NotAllowedError      PERMISSION_DENIED    the session belongs to another tenant
    │                       UNAUTHENTICATED      no or wrong credentials
    ├─ PreconditionError    FAILED_PRECONDITION  see `reason`: APPEND_POSITION and others
    ├─ ExhaustedError       RESOURCE_EXHAUSTED   see `retry_after_seconds`
    ├─ DataLossError        DATA_LOSS            checksum mismatch; K and V lost with the device
    ├─ UnsupportedError     UNIMPLEMENTED        the server does not have it
    ├─ DeadlineError        DEADLINE_EXCEEDED    the call took longer than it was given
    ├─ InternalError        INTERNAL, UNKNOWN    device fault; a server that breaks the protocol
    └─ UnavailableError     UNAVAILABLE          no server, or one that is draining

Any other code is a plain DynSplitError. `PassthroughWarning` is what a call warns with that was
told to return the caller's own tensors where the service is away.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DETAILS_KEY = "grpc-status-details-bin"


@dataclasses.dataclass(frozen=True)
class Violation:
    """One reason for a refusal: a field of the request, or a precondition's subject."""

    field: str
    description: str


class DynSplitError(Exception):
    """A call failed."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        metadata: dict[str, str] | None = None,
        resource: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        """Of the parts a server's answer has; absent ones are empty."""
        super().__init__(message)
        self.code = code
        """Name of the canonical status code, such as NOT_FOUND."""
        self.reason = reason
        """Machine-readable reason, such as SESSION_EXPIRED."""
        self.violations = violations
        """Fields that are wrong, or preconditions not met."""
        self.metadata = metadata or {}
        """What the server says about the reason."""
        self.resource = resource
        """Name of the resource that was not found."""
        self.retry_after_seconds = retry_after_seconds
        """When another try may succeed; None where it would not."""

    def __str__(self) -> str:
        """Code, reason, message and violations on one line."""
        parts = [f"{self.code}{f' ({self.reason})' if self.reason else ''}: {self.args[0]}"]
        parts += [f"{violation.field}: {violation.description}" for violation in self.violations]
        return "; ".join(parts)


class InvalidRequestError(DynSplitError):
    """INVALID_ARGUMENT."""


class NotFoundError(DynSplitError):
    """NOT_FOUND."""


class ExistsError(DynSplitError):
    """ALREADY_EXISTS."""


class NotAllowedError(DynSplitError):
    """PERMISSION_DENIED or UNAUTHENTICATED."""


class PreconditionError(DynSplitError):
    """FAILED_PRECONDITION."""


class ExhaustedError(DynSplitError):
    """RESOURCE_EXHAUSTED."""


class DataLossError(DynSplitError):
    """DATA_LOSS."""


class UnsupportedError(DynSplitError):
    """UNIMPLEMENTED."""


class DeadlineError(DynSplitError):
    """DEADLINE_EXCEEDED."""


class InternalError(DynSplitError):
    """INTERNAL or UNKNOWN."""


class UnavailableError(DynSplitError):
    """UNAVAILABLE."""


class EngineError(Exception):
    """The engine library (`dynsplit.engine`) refused a call, or CUDA did."""


class PassthroughWarning(UserWarning):
    """A call returned the caller's own tensors, because the service could not do its work."""


AWAY = (UnavailableError, ExhaustedError, DeadlineError, InternalError, DataLossError)
"""Errors that are the service's, not the request's: what `on_error="passthrough"` stands for."""

_CLASSES: dict[str, type[DynSplitError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": ExistsError,
    "PERMISSION_DENIED": NotAllowedError,
    "UNAUTHENTICATED": NotAllowedError,
    "FAILED_PRECONDITION": PreconditionError,
    "RESOURCE_EXHAUSTED": ExhaustedError,
    "DATA_LOSS": DataLossError,
    "UNIMPLEMENTED": UnsupportedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "INTERNAL": InternalError,
    "UNKNOWN": InternalError,
    "UNAVAILABLE": UnavailableError,
}


@functools.cache
def message_class(name: str) -> Any:
    """Class of google.rpc.`name`, from a pool of our own.

    The default pool may hold google.rpc already, from a package whose files differ from ours.
    """
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"google.rpc.{name}"))


@functools.cache
def _pool() -> Any:
    packed = importlib.resources.files("dynsplit.v1").joinpath("error_details.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(packed).file:
        pool.Add(file)
    return pool


def _details(trailers: Any) -> dict[str, Any]:
    """Details by message name; nothing where the trailer is absent or cannot be read."""
    packed = next((value for key, value in trailers or () if key == _DETAILS_KEY), None)
    details: dict[str, Any] = {}
    if packed is None:
        return details
    for entry in message_class("Status").FromString(packed).details:
        name = entry.type_url.rpartition("/google.rpc.")[2]
        try:
            details[name] = message_class(name).FromString(entry.value)
        except KeyError:  # a detail of a later server
            continue
    return details


def from_rpc_error(error: grpc.RpcError) -> DynSplitError:
    """The exception that stands for a failed call."""
    code = error.code().name
    try:
        details = _details(error.trailing_metadata())
    except Exception:  # an unreadable trailer must not hide the error itself
        details = {}
    violations = [
        Violation(entry.field, entry.description)
        for entry in getattr(details.get("BadRequest"), "field_violations", ())
    ]
    violations += [
        Violation(entry.subject, f"{entry.type}: {entry.description}")
        for entry in getattr(details.get("PreconditionFailure"), "violations", ())
    ]
    violations += [
        Violation(entry.subject, entry.description)
        for entry in getattr(details.get("QuotaFailure"), "violations", ())
    ]
    info, retry = details.get("ErrorInfo"), details.get("RetryInfo")
    unmet = getattr(details.get("PreconditionFailure"), "violations", ())
    reason = info.reason if info else unmet[0].type if unmet else ""
    return _CLASSES.get(code, DynSplitError)(
        error.details() or "no message",
        code=code,
        reason=reason,
        violations=tuple(violations),
        metadata=dict(info.metadata) if info else None,
        resource=getattr(details.get("ResourceInfo"), "resource_name", ""),
        retry_after_seconds=(
            retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9 if retry else None
        ),
    )
