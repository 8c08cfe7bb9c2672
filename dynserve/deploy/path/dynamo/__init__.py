"""Dynamo's command lines, run by dynserve: see `dynserve.deploy.entry`."""
