"""The planes' messages: frozen msgspec structs, one closed union per plane, decoders built once."""
