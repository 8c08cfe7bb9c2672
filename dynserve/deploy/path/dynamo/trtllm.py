"""`python -m dynamo.trtllm`."""

from dynserve.deploy.entry import main

if __name__ == "__main__":
    main("trtllm")
