"""`python -m dynamo.vllm`."""

from dynserve.deploy.entry import main

if __name__ == "__main__":
    main("vllm")
