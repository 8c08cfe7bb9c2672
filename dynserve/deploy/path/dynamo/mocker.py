"""`python -m dynamo.mocker`."""

from dynserve.deploy.entry import main

if __name__ == "__main__":
    main("mocker")
