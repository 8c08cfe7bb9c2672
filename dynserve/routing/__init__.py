"""The synchronous core of placement: index, ledger, policy, router. No sockets, clocks or tasks."""
