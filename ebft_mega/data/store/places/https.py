"""The store of https servers."""

from ebft_mega.data.transfer.addresses import https_address_problem
from ebft_mega.data.transfer.https_client import HttpsClient
from ebft_mega.extension.store import Store, Transfer


class HttpsStore(Store):
    """Files of https servers that need no credentials. Certificates are verified."""

    name = "https"

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Why an address is not one that is read."""
        return https_address_problem(address)

    def client(self, transfer: Transfer) -> HttpsClient:
        """Make a client."""
        return HttpsClient(transfer)
