"""`python -m dynamo.frontend`."""

from dynserve.deploy.entry import main

if __name__ == "__main__":
    main("frontend")
