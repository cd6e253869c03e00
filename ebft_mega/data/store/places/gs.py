"""The store of Google Cloud Storage.

Not through fsspec's gcsfs: importing it loads a pickle from the home directory (`~/.gcs_tokens`), and nothing is
unpickled here. Credentials come from google-auth, as they do there.
"""

import json
import os
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ebft_mega.data.transfer.addresses import bucket_address_problem, bucket_and_name, endpoint_problem
from ebft_mega.data.transfer.answers import Asked, RefusedError, TransferFailureError, TransientError, status_text
from ebft_mega.data.transfer.https_client import HttpsClient, silence
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.store import Store, Transfer

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

_ENDPOINT, _EMULATOR = "https://storage.googleapis.com", "STORAGE_EMULATOR_HOST"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_REASON = re.compile(rb'"reason":\s*"([A-Za-z]{1,60})"')
_DESCRIPTION_BYTES = 1 << 20
_CREDENTIALS = (
    "credentials that may read it (GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or an "
    "account of the machine), or options.gs.anonymous for a public bucket"
)


class GsStore(Store):
    """Buckets of Google Cloud Storage: `gs://BUCKET/FOLDER`. Credentials are Google's application default ones.

    With STORAGE_EMULATOR_HOST, that server is asked instead, without credentials.
    """

    class Options(Section):
        """Of `options.gs`."""

        anonymous: bool = key(False, "Read public buckets without credentials.")

    name = "gs"
    modules = ("google.auth", "requests")
    install = "pip install 'ebft-mega[gs]'"

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Why an address is not one of a bucket."""
        return bucket_address_problem(address)

    def client(self, transfer: Transfer) -> "GsClient":
        """Make a client."""
        return GsClient(transfer, self.options.anonymous)


class GsClient(HttpsClient):
    """Reads objects through the JSON interface, with a token that is sent to Google's server alone.

    Args:
        transfer: timeouts, retries and redirects.
        anonymous: no token is sent.
    """

    def __init__(self, transfer: Transfer, anonymous: bool):
        super().__init__(transfer)
        self._anonymous = anonymous

    def _start_empty(self) -> None:
        super()._start_empty()
        self._credentials: Credentials | None = None
        self._signing = threading.Lock()

    def _arguments(self) -> tuple[object, ...]:
        return self._transfer, self._anonymous

    def _asked(self, method: str, url: str) -> Asked:
        bucket, name = bucket_and_name(url)
        emulator = os.environ.get(_EMULATOR, "")
        if emulator and "://" not in emulator:
            emulator = f"http://{emulator}"
        if emulator and endpoint_problem(emulator, is_secret=False) is not None:
            raise RefusedError(f"no valid {_EMULATOR}", "an address with host and port")
        headers = {} if emulator or self._anonymous else self._token_headers()
        query = "alt=media" if method == "GET" else "fields=size,generation"
        if method == "GET" and (version := self._versions.get(url)):
            query += f"&ifGenerationMatch={version}"
        endpoint = emulator.rstrip("/") or _ENDPOINT
        return Asked(
            "GET", f"{endpoint}/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}?{query}", headers
        )

    def _size(self, url: str) -> int:
        with self._answered(self._asked("HEAD", url)) as answer:
            content = b"".join(self._body(answer, _DESCRIPTION_BYTES))
        try:
            fields = json.loads(content)
            num_bytes, version = int(fields["size"]), str(fields.get("generation", ""))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RefusedError("an answer that is no description of an object") from None
        if num_bytes < 0 or not re.fullmatch("[0-9]{0,30}", version):
            raise RefusedError("an answer that is no description of an object")
        self._versions[url] = version
        return num_bytes

    def _token_headers(self) -> dict[str, str]:
        import google.auth
        import google.auth.exceptions
        import google.auth.transport.requests

        silence("google", "urllib3", "requests")
        request = google.auth.transport.requests.Request()

        def in_time(url: str, timeout: float | None = None, **arguments: Any) -> Any:
            own = self._transfer.timeout_seconds
            return request(url, timeout=own if timeout is None else min(timeout, own), **arguments)

        ask: Any = in_time  # the library asks for its own class
        try:
            with self._signing:
                if self._credentials is None:
                    self._credentials, _ = google.auth.default(scopes=[_SCOPE], request=ask)
                if not self._credentials.valid:
                    self._credentials.refresh(ask)
                headers: dict[str, str] = {}
                self._credentials.apply(headers)
                return headers
        # Not the library's own words: they repeat what the user's files and the token's server say.
        except google.auth.exceptions.TransportError:
            raise TransientError("no answer of the server that gives tokens", _CREDENTIALS) from None
        except google.auth.exceptions.DefaultCredentialsError:
            raise RefusedError("no credentials", _CREDENTIALS) from None
        except (google.auth.exceptions.GoogleAuthError, ValueError) as error:
            raise RefusedError(f"credentials that give no token: {type(error).__name__}", _CREDENTIALS) from None

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        match = _REASON.search(body)
        code = "noSuchBucket" if b"bucket does not exist" in body else match[1].decode() if match else ""
        found, expected = f"{status_text(status)}: {code}" if code else status_text(status), None
        if status == 412:
            found, expected = f"{found}: other contents than at the start", "the object as it was at the start"
        elif status in (401, 403):
            expected = _CREDENTIALS
        elif code == "noSuchBucket":
            expected = "a bucket"
        return RefusedError(found, expected, status, code)

    def _is_absent(self, failure: TransferFailureError, if_forbidden: bool) -> bool:
        return failure.code != "noSuchBucket" and super()._is_absent(failure, if_forbidden)
