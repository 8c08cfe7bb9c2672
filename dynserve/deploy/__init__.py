"""Deployments from files: reading `DynamoGraphDeployment`s, and running them on this machine."""
