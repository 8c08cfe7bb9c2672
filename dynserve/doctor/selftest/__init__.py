"""`dynserve doctor --trtllm-selftest`: compares the installed TensorRT-LLM with what the executor relies on.

fact      one expectation, what was found, and their table
engines   two engines in this process, and requests to them
api       names, keywords and options of the package
requests  requests of each kind: sampling, limits, log-probabilities, grammars, adapters
handoffs  hand-offs between the two engines, cancelled ones, KV events, statistics
death     what is left when an engine is shut down or killed
run       all of it, in order
"""
