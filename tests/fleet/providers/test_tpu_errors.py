"""Every error of Cloud TPU's client is one of a provider's."""

from __future__ import annotations

import grpc
import pytest
from google.api_core.exceptions import GoogleAPICallError, from_grpc_status
from google.auth.exceptions import DefaultCredentialsError, RefreshError
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, Help, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from tpu_cases import SPOT, account

from spotjax.errors import OutOfCapacity, ProviderError, ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.providers.tpu_errors import CODES, from_status, provider_error, said
from spotjax.testing.tpu_service import Fault

KINDS = {
    "CANCELLED": ProviderUnavailable, "UNKNOWN": ProviderUnavailable, "INVALID_ARGUMENT": ProviderRefused,
    "DEADLINE_EXCEEDED": ProviderUnavailable, "NOT_FOUND": ProviderRefused, "ALREADY_EXISTS": ProviderRefused,
    "PERMISSION_DENIED": ProviderRefused, "UNAUTHENTICATED": ProviderRefused, "RESOURCE_EXHAUSTED": OutOfCapacity,
    "FAILED_PRECONDITION": ProviderRefused, "ABORTED": ProviderUnavailable, "UNIMPLEMENTED": ProviderRefused,
    "INTERNAL": ProviderUnavailable, "UNAVAILABLE": ProviderUnavailable, "DATA_LOSS": ProviderUnavailable,
    "OUT_OF_RANGE": ProviderRefused, "OK": ProviderUnavailable,
}  # fmt: skip


def test_there_is_no_other_code() -> None:
    assert set(KINDS) == {code.name for code in grpc.StatusCode} == {code.name for code in CODES}


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_code_is_one_error_as_exception_and_as_status(code: grpc.StatusCode) -> None:
    raised = provider_error(from_grpc_status(code, "words"))
    told = from_status(Status(code=code.value[0], message="words"))
    assert type(raised) is type(told) is KINDS[code.name]
    assert str(raised) == str(told) == f"{code.name}: words"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_code_of_every_call_comes_out_of_the_provider(code: grpc.StatusCode) -> None:
    """Over the wire. What a call takes as its answer (there already, gone already, not yet) is no error."""
    expected = {
        "ListQueuedResources": KINDS[code.name],
        "ListNodes": KINDS[code.name],
        "CreateQueuedResource": None if code is grpc.StatusCode.ALREADY_EXISTS else KINDS[code.name],
        "DeleteQueuedResource": {
            grpc.StatusCode.NOT_FOUND: None, grpc.StatusCode.FAILED_PRECONDITION: ProviderUnavailable,
        }.get(code, KINDS[code.name]),
    }  # fmt: skip
    async with account() as there, there.provider() as provider:
        await there.running(provider, "a")
        for method, kind in expected.items():
            there.service.faults.append(Fault(method, code.name, "words", retry_seconds=2.5))
            call = provider.release("a") if method == "DeleteQueuedResource" else provider.request("b", SPOT.offer)
            if kind is None:
                await call
                continue
            with pytest.raises(ProviderError, match="words") as raised:
                await call
            assert type(raised.value) is kind, method
            if isinstance(raised.value, ProviderUnavailable):
                assert raised.value.retry_after in (2.5, 10.0)
        assert not there.service.faults


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("RESOURCE_EXHAUSTED", 'There is no more capacity in the zone "europe-west4-a"; you can try', OutOfCapacity),
        ("RESOURCE_EXHAUSTED", "Insufficient reserved capacity. Contact customer support", OutOfCapacity),
        ("RESOURCE_EXHAUSTED", "Quota limit 'TPUV6EPreemptiblePerProjectPerRegion' has been exceeded.", QuotaExceeded),
        ("RESOURCE_EXHAUSTED", "Quota 'TPUV4sPodPerProjectPerRegion' exhausted. Limit 20800", QuotaExceeded),
        (
            "RESOURCE_EXHAUSTED",
            "Quota exceeded for metric 'Requests' and limit 'Requests per minute'",
            ProviderUnavailable,
        ),
        ("INTERNAL", "an internal error has occurred", ProviderUnavailable),
        ("UNAVAILABLE", "ZONE_RESOURCE_POOL_EXHAUSTED", OutOfCapacity),
        ("FAILED_PRECONDITION", "does not have enough resources available to fulfill the request", OutOfCapacity),
        ("PERMISSION_DENIED", "no permission to look at the quota or capacity", ProviderRefused),
    ],
)
def test_quota_stockout_and_haste_are_told_apart_by_words(code: str, message: str, kind: type[Exception]) -> None:
    assert type(provider_error(from_grpc_status(grpc.StatusCode[code], message))) is kind


def test_quota_and_haste_are_told_apart_by_details() -> None:
    quota = QuotaFailure(violations=[QuotaFailure.Violation(subject="project")])
    haste = ErrorInfo(reason="RATE_LIMIT_EXCEEDED", domain="googleapis.com")
    empty = ErrorInfo(reason="resource_availability", domain="compute.googleapis.com")
    for detail, kind in ((quota, QuotaExceeded), (haste, ProviderUnavailable), (empty, OutOfCapacity)):
        status = Status(code=8, message="no")
        status.details.add().Pack(Help())
        status.details.add().Pack(detail)
        assert type(from_status(status)) is kind
        assert type(provider_error(from_grpc_status(8, "no", details=[Help(), detail]))) is kind


def test_the_time_to_wait_is_read_and_kept() -> None:
    status = Status(code=14, message="busy")
    status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=7, nanos=500_000_000)))
    error = said("cannot list", from_status(status))
    assert isinstance(error, ProviderUnavailable) and error.retry_after == 7.5
    assert str(error) == "cannot list: UNAVAILABLE: busy"
    plain = from_status(Status(code=14))
    assert isinstance(plain, ProviderUnavailable) and plain.retry_after is None


def test_credentials_that_fail_are_refused_unless_that_passes() -> None:
    assert type(provider_error(DefaultCredentialsError("none"))) is ProviderRefused  # type: ignore[no-untyped-call]
    assert type(provider_error(RefreshError("down", retryable=True))) is ProviderUnavailable  # type: ignore[no-untyped-call]
    assert type(provider_error(GoogleAPICallError("no code"))) is ProviderUnavailable
