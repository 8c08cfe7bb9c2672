"""`python -m dynamo.sglang`."""

from dynserve.deploy.entry import main

if __name__ == "__main__":
    main("sglang")
