"""Implementations of the planes: NATS, etcd and TCP links for clusters, and in memory for tests and notebooks."""
