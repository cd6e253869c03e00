"""A local https server for the tests of this folder."""

from tests.unit.data.store.conftest import certificate, server

__all__ = ["certificate", "server"]
