"""`dynserve doctor`: checks a machine before a role is started on it, and reports problems and their remedies.

finding   one finding, and the options of the checks
machine   GPU, driver, libraries, limits
cluster   model, engine options, planes, ports
report    all findings as lines or JSON, and the exit code
"""
