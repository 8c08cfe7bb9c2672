"""The planes' carriers: NATS and etcd for real, memory for tests and notebooks, and the TCP link."""
