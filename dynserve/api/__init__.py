"""The requests of the APIs, one module per API: parsed and checked, then converted to one normal form (`normalize`)."""
