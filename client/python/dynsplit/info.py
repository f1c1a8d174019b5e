# SPDX-License-Identifier: Apache-2.0
"""Operations of the service Info: what the server is, and whether compression pays."""

from __future__ import annotations

from collections.abc import Sequence

from dynsplit.calls import Context, Unary
from dynsplit.policies import as_policy
from dynsplit.tensors import dtype_code
from dynsplit.v1 import compression_pb2, info_pb2, types_pb2


def server_info(context: Context) -> Unary[info_pb2.ServerInfo]:
    """Version, device, limits and capabilities (proto ServerInfo)."""
    return Unary(
        "Info", "GetServerInfo", info_pb2.GetServerInfoRequest(), lambda a: a, repeatable=True
    )


def policies(context: Context) -> Unary[list[info_pb2.PolicyInfo]]:
    """Every preset with the evidence it needs and can use (proto PolicyInfo)."""
    return Unary(
        "Info",
        "ListPolicies",
        info_pb2.ListPoliciesRequest(),
        lambda answer: list(answer.policies),
        repeatable=True,
    )


def profiles(context: Context) -> Unary[list[info_pb2.DelimiterProfileInfo]]:
    """Delimiter profiles by ascending name, without their weights."""
    return Unary(
        "Info",
        "ListDelimiterProfiles",
        info_pb2.ListDelimiterProfilesRequest(),
        lambda answer: list(answer.profiles),
        repeatable=True,
    )


def profile(context: Context, name: str = "") -> Unary[compression_pb2.DelimiterProfile]:
    """One delimiter profile with its weights; empty = the server's default.

    Raises:
        NotFoundError: there is none of that name.
    """
    return Unary(
        "Info",
        "GetDelimiterProfile",
        info_pb2.GetDelimiterProfileRequest(name=name),
        lambda answer: answer,
        repeatable=True,
    )


def put_profile(
    context: Context, profile: compression_pb2.DelimiterProfile, *, replace: bool = False
) -> Unary[info_pb2.PutDelimiterProfileResponse]:
    """Stores a delimiter profile under its name.

    Args:
        context: of the client.
        profile: name, and weights with ascending distinct token ids.
        replace: a stored one of that name; built-in ones cannot be replaced.

    Raises:
        ExistsError: there is one of that name.
    """
    request = info_pb2.PutDelimiterProfileRequest(profile=profile, replace=replace)
    return Unary("Info", "PutDelimiterProfile", request, lambda a: a, repeatable=replace)


def advise(
    context: Context,
    shape: types_pb2.SequenceShape,
    *,
    link_bytes_per_second: float = 0.0,
    time_to_first_token_seconds: float = 0.0,
    evidence: Sequence[types_pb2.Evidence] = (),
    min_retained_attention_mass: float = 0.0,
    max_expected_divergence: float = 0.0,
    dtype: str = "bfloat16",
    session: types_pb2.SessionOptions | None = None,
    session_policy: types_pb2.Policy | str | None = None,
) -> Unary[info_pb2.AdviseResponse]:
    """From model, context, link and goal to a policy, or to "do not compress".

    The answer (proto AdviseResponse) has `compress`, the `policy` to pass on, the seconds of both
    ways, the expected receipt and divergence, and the `reason` in one sentence.

    Args:
        context: of the client.
        shape: model and context.
        link_bytes_per_second: between prefill and decode, > 0.
        time_to_first_token_seconds: goal, from the end of prefill; 0 = as soon as possible, with
            the fewest tokens that are acceptable.
        evidence: that the engine can supply.
        min_retained_attention_mass: smallest acceptable, in [0, 1]; 0 = the server's default (0.9).
        max_expected_divergence: largest acceptable, nats a token; 0 = any.
        dtype: type of K and V.
        session: predict the memory of such a session instead (`session_bytes` is shorter).
        session_policy: of that session.

    Raises:
        InvalidRequestError: a field is out of range.
        UnsupportedError: the server reads no such evidence.
    """
    request = info_pb2.AdviseRequest(
        shape=shape,
        dtype=dtype_code(dtype),
        link_bytes_per_second=link_bytes_per_second,
        time_to_first_token_seconds=time_to_first_token_seconds,
        evidence=evidence,
        min_retained_attention_mass=min_retained_attention_mass,
        max_expected_divergence=max_expected_divergence,
        session=session,
        session_policy=as_policy(session_policy),
    )
    return Unary("Info", "Advise", request, lambda answer: answer, repeatable=True)
