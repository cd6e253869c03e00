"""The store of repositories on Hugging Face's hub, or another server with its interface."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from ebft_mega.data.transfer.addresses import endpoint_problem
from ebft_mega.data.transfer.answers import Asked, RefusedError, TransferFailureError, status_text
from ebft_mega.data.transfer.https_client import HttpsClient
from ebft_mega.errors import DamagedDataError
from ebft_mega.extension.store import Store, Transfer

_ENDPOINT = "https://huggingface.co"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_ADDRESS = re.compile(
    rf"hf://(?P<kind>datasets/)?(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>(?:[A-Za-z0-9._-]|%2F){{1,128}}))?"
    r"(?P<path>(?:/[^\s?#@/]+)*)/?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_CODE = re.compile("[A-Za-z]{1,60}")
_API_BYTES = 1 << 24
_TOKEN = re.compile("[!-~]{1,1000}")
_HUB = "*.hf.co", "*.huggingface.co"  # where the hub keeps large files
_CREDENTIALS = "a repository that HF_TOKEN (or hf auth login) may read"


class HfStore(Store):
    """Repositories on Hugging Face's hub: `hf://datasets/USER/NAME[@REVISION]/FOLDER`, `hf://USER/NAME[@REVISION]`.

    A branch is resolved to its commit once, at the start. HF_ENDPOINT names another server, HF_TOKEN (or the file that
    `hf auth login` writes) the token, which is sent to that server alone.
    """

    name = "hf"

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Why an address is not one of a repository."""
        match = _ADDRESS.fullmatch(address)
        if match is None or match["repository"].split("/")[0] in ("datasets", "spaces", "models"):
            return "no hf://datasets/USER/NAME or hf://USER/NAME, with @REVISION and a folder if you like"
        return "a part . or .." if {".", ".."} & set(match["path"].split("/")) else None

    def client(self, transfer: Transfer) -> "HfClient":
        """Make a client."""
        return HfClient(transfer)


class HfClient(HttpsClient):
    """Reads files of repositories, with a token that is sent to the hub's own server alone."""

    def __init__(self, transfer: Transfer):
        super().__init__(transfer, _HUB)

    def fixed(self, address: str) -> str:
        """The address with the commit that its revision is now.

        Raises:
            DamagedDataError: there is none, or no usable answer.
        """
        match = _parts(address)
        revision = match["revision"] or "main"
        if _COMMIT.fullmatch(revision):
            return address
        kind = "datasets" if match["kind"] else "models"

        def ask() -> Asked:
            endpoint, headers = self._endpoint()
            url = f"{endpoint}/api/{kind}/{match['repository']}/revision/{quote(revision, safe='%')}?expand=sha"
            return Asked("GET", url, headers)

        content = self._read_small(address, _API_BYTES, False, ask)
        try:
            commit = json.loads(content or b"null")["sha"]
        except (ValueError, TypeError, KeyError, RecursionError):
            commit = None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            found = "no such repository or revision" if content is None else "an answer without a commit"
            raise DamagedDataError(address, None, "a repository with this revision", found)
        return f"hf://{match['kind'] or ''}{match['repository']}@{commit}{match['path']}"

    def _asked(self, method: str, url: str) -> Asked:
        match = _parts(url)
        endpoint, headers = self._endpoint()
        revision = quote(match["revision"] or "main", safe="%")
        path = quote(match["path"])
        return Asked(method, f"{endpoint}/{match['kind'] or ''}{match['repository']}/resolve/{revision}{path}", headers)

    def _endpoint(self) -> tuple[str, dict[str, str]]:
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _ENDPOINT
        token = _token()
        if endpoint_problem(endpoint, is_secret=token is not None) is not None:
            raise RefusedError("no valid HF_ENDPOINT", "an https address, or an http one of this machine")
        return endpoint, {"Authorization": f"Bearer {token}"} if token else {}

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        code = headers.get("X-Error-Code", "")
        code = code if _CODE.fullmatch(code) else ""
        found = f"{status_text(status)}: {code}" if code else status_text(status)
        is_refused = status in (401, 403) or code in ("RepoNotFound", "GatedRepo")
        return RefusedError(found, _CREDENTIALS if is_refused else None, status, code)

    def _is_absent(self, failure: TransferFailureError, if_forbidden: bool) -> bool:
        """The hub says 401 and 403 of whole repositories, not of files."""
        is_of_repository = failure.status in (401, 403) or failure.code in ("RepoNotFound", "RevisionNotFound")
        return not is_of_repository and super()._is_absent(failure, False)


def _parts(address: str) -> re.Match[str]:
    match = _ADDRESS.fullmatch(address)
    assert match is not None, "the address was checked"
    return match


def _token() -> str | None:
    """The token of the environment, or of the file of `hf auth login`; None where there is none."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token if _TOKEN.fullmatch(token) else None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    try:
        text = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _TOKEN.fullmatch(text) else None
