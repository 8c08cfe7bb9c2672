"""`dynserve doctor`: looks at a machine before anything is started on it, and says what would go wrong and what to do.

report    what is found, how it is told, the exit code
machine   GPU, driver, libraries, limits
cluster   model, engine options, planes, ports
"""
