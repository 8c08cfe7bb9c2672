"""`dynserve doctor --trtllm-selftest`: compares the installed TensorRT-LLM with what the executor relies on.

fact      one expectation, the value that was found, and their line in the table
engines   the engines under test, and requests to them
adapter   a LoRA adapter with random weights, for the model under test
api       names, keywords and options of the package
requests  requests of each kind to one engine: sampling, limits, log-probabilities, grammars
pair      a prefill and a decode engine: hand-offs, KV events, statistics, adapters, refusals, a killed engine
run       the run: engines are built, and facts are checked in order
"""
