"""The TensorRT-LLM executor, written against version 1.3.0rc29 (and 1.2.1 where that differs), PyTorch backend.

environment     variables and libraries that must be set up before the import
options         the user's options from files, flags and old spellings
arguments       the arguments of `LLM(...)`: these options, and what serving needs
lora            `lora_config`, from the folders of adapters
api             the names imported from the package, and the features of this version
start           `open_executor`: from options to the first token
engine          one engine: its start, failure and shutdown
probes          the proofs that an engine gives before it serves: adapters, KV events
executor        requests into the engine, answers out of it
engine_request  one request in the engine
in_flight       the requests of one rank in the engine, and the tokens that they hold
request         a `GenerateRequest` as TensorRT-LLM's parameters
answer          TensorRT-LLM's cumulative results as `Output`s
state           the data that a hand-off carries from the context to the generation phase
pump            the thread that reads KV events and statistics
kv_events       KV events, translated to our block hashes
stats           statistics, as a load report and metrics
watch           detects an engine that is dead or silent
"""

PIN = "1.3.0rc29"
