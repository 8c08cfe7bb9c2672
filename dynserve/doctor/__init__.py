"""`dynserve doctor`: examines a machine before anything is started on it, and says what would go wrong and what to do.

finding   one finding, and the options of the examination
machine   GPU, driver, libraries, limits
cluster   model, engine options, planes, ports
report    all findings as lines or JSON, and the exit code
"""
