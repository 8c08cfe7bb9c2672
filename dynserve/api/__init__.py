"""The APIs' requests, one module per API: parsed and checked, then brought into one normal form (`normalize`)."""
