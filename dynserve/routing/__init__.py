"""The synchronous core of placement: hashes, index, ledger, policy, router. No sockets, clocks or tasks."""
