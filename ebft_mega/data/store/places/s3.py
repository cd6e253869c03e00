"""The store of Amazon S3 and of servers that speak its language, through fsspec's s3fs."""

import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ebft_mega.data.transfer.addresses import bucket_address_problem, bucket_and_name
from ebft_mega.data.transfer.answers import Asked, RefusedError, TransferFailureError, TransientError, status_text
from ebft_mega.data.transfer.https_client import HttpsClient, silence
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.store import Store, Transfer

if TYPE_CHECKING:
    from s3fs import S3FileSystem

_SIGNED_SECONDS = 900  # how long a signed address may be used; each request has one of its own
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
_REGION = re.compile(rb"<Region>([a-z0-9-]{1,30})</Region>")
_REGION_NAME = re.compile("[a-z0-9-]{1,30}")
_OTHER_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "AuthorizationQueryParametersError")
_CREDENTIALS = (
    "credentials that may read it (AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the "
    "machine), or options.s3.anonymous for a public bucket"
)
_METHODS = {"GET": "get_object", "HEAD": "head_object"}
# What ends an attempt before anything is sent. The library's own words may repeat what stands in the user's files.
_FAILURES = {
    "NoCredentialsError": "no credentials",
    "PartialCredentialsError": "incomplete credentials",
    "ProfileNotFound": "no such profile as AWS_PROFILE names",
    "InvalidRegionError": "no valid region (AWS_REGION)",
    "ConfigParseError": "a file of the AWS configuration that cannot be read",
    "SSOTokenLoadError": "no sign-in (aws sso login)",
    "UnauthorizedSSOTokenError": "a sign-in that has expired (aws sso login)",
    "ValueError": "no valid AWS_ENDPOINT_URL",
}


class S3Store(Store):
    """Buckets of Amazon S3 and of servers that speak its language (AWS_ENDPOINT_URL): `s3://BUCKET/FOLDER`.

    Credentials and the region come from the environment, ~/.aws or the machine's role, as the AWS command line finds
    them.
    """

    class Options(Section):
        """Of `options.s3`."""

        anonymous: bool = key(False, "Read public buckets without credentials.")

    name = "s3"
    modules = ("s3fs",)
    install = "pip install 'ebft-mega[s3]'"

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Why an address is not one of a bucket."""
        return bucket_address_problem(address)

    def client(self, transfer: Transfer) -> "S3Client":
        """Make a client."""
        return S3Client(transfer, self.options.anonymous)


class S3Client(HttpsClient):
    """Reads objects by signed addresses: each request is signed here (`s3fs`), so that no key leaves this process.

    Args:
        transfer: timeouts, retries and redirects.
        anonymous: nothing is signed.
    """

    def __init__(self, transfer: Transfer, anonymous: bool):
        super().__init__(transfer)
        self._anonymous = anonymous

    def _start_empty(self) -> None:
        super()._start_empty()
        self._files: S3FileSystem | None = None
        self._signing = threading.Lock()

    def _arguments(self) -> tuple[object, ...]:
        return self._transfer, self._anonymous

    def _asked(self, method: str, url: str) -> Asked:
        bucket, name = bucket_and_name(url)
        try:
            signed = self._file_system().url(
                f"{bucket}/{name}",
                expires=_SIGNED_SECONDS,
                client_method=_METHODS[method],
                timeout=self._transfer.timeout_seconds,
            )
        except Exception as error:  # of several libraries, without a base
            raise self._failure_to_sign(error) from None
        version = self._versions.get(url)
        return Asked(method, signed, {"If-Match": version} if version and method == "GET" else {})

    def _file_system(self) -> "S3FileSystem":
        import s3fs

        with self._signing:
            if self._files is None:
                silence("s3fs", "fsspec", "botocore", "aiobotocore", "aiohttp")
                limits: dict[str, Any] = dict.fromkeys(
                    ("connect_timeout", "read_timeout"), self._transfer.timeout_seconds
                )
                if not self._anonymous:
                    limits["signature_version"] = "s3v4"
                self._files = s3fs.S3FileSystem(anon=self._anonymous, config_kwargs=limits, skip_instance_cache=True)
            return self._files

    def _failure_to_sign(self, error: Exception) -> TransferFailureError:
        import botocore.exceptions
        import fsspec.exceptions

        if isinstance(error, fsspec.exceptions.FSTimeoutError | TimeoutError):
            return TransientError(f"no credentials within {self._transfer.timeout_seconds:g} s", _CREDENTIALS)
        if isinstance(error, botocore.exceptions.ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))[:60]
            return RefusedError(f"no credentials: {code}", _CREDENTIALS)
        name = type(error).__name__
        return RefusedError(_FAILURES.get(name, f"no credentials: {name}"), _CREDENTIALS)

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        match = _CODE.search(body)
        code = match[1].decode() if match else ""
        found, expected = f"{status_text(status)}: {code}" if code else status_text(status), None
        if status == 412:
            found, expected = f"{found}: other contents than at the start", "the object as it was at the start"
        elif status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            expected = _CREDENTIALS
        elif code == "NoSuchBucket":
            expected = "a bucket"
        elif code in _OTHER_REGION or 300 <= status < 400:
            region = _region(headers, body)
            found = f"{found}: a bucket of {region or 'another region'}"
            expected = f"AWS_REGION={region}" if region else "AWS_REGION with the region of the bucket"
        return RefusedError(found, expected, status, code)

    def _is_absent(self, failure: TransferFailureError, if_forbidden: bool) -> bool:
        if failure.status == 403:
            return if_forbidden and failure.code == "AccessDenied"
        return failure.code != "NoSuchBucket" and super()._is_absent(failure, if_forbidden)


def _region(headers: Mapping[str, str], body: bytes) -> str:
    """The region in which a server says that a bucket is; empty where it does not say."""
    match, name = _REGION.search(body), headers.get("x-amz-bucket-region", "")
    return match[1].decode() if match else name if _REGION_NAME.fullmatch(name) else ""
