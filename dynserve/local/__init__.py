"""A whole cluster on one machine: embedded etcd and NATS, `dynserve up`, and model folders for experiments."""
