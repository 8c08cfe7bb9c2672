"""The whole cluster on one machine: embedded etcd and NATS, and `dynserve up`."""
