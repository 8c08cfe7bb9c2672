"""The planes' messages: frozen msgspec structs, one closed union per plane, decoders built once."""

import msgspec

# What a decoder raises for bytes that are no message: msgspec leaves text that is no UTF-8 to Python's own error.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError)
