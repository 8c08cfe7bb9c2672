"""The TensorRT-LLM executor, written against version 1.3.0rc29 (and 1.2.1 where that differs), PyTorch backend.

environment   what must be right before the import
options       files, flags and old spellings to `LLM(...)`'s arguments; the rules of a role
api           what is imported of the package, and what this version of it can
start         `open_executor`: from options to the first token
engine        one engine: its first token, its death, its end
executor      requests into it, answers out of it
request       a `GenerateRequest` in TensorRT-LLM's words
answer        its cumulative results back into `Output`s
state         what a hand-off carries from the context to the generation phase
pump          the thread that reads KV events and statistics
kv_events     those events into our block hashes
stats         those rows into a load report and metrics
watch         notices an engine that is dead or silent
"""

PIN = "1.3.0rc29"
