"""The process and its run directory: lock, stop requests, watchdog, agreement between ranks, outcome."""
