"""A folder for PYTHONPATH: see `dynserve.deploy.entry`."""
