"""`Loopback`: the link for a request that a worker sends to itself."""

from __future__ import annotations

import asyncio
import logging
from secrets import token_hex
from typing import Any

from dynserve.errors import ClusterError, InternalError
from dynserve.streams import Channel
from dynserve.transport.base import Bus
from dynserve.wire import decoded, requests
from dynserve.wire.link import Failed, Finished, SubmitReply
from dynserve.wire.requests import Accepted, Ack, GenerateRequest, Refused

log = logging.getLogger(__name__)

TIMEOUT = 120.0  # seconds until the answer must be there
AGAIN = 2.0  # seconds until the request is sent again: NATS may lose one


class Loopback:
    """A link whose messages stay in this process. It waits for one answer."""

    def __init__(self) -> None:
        self.name = f"self-{token_hex(4)}"
        self.closed = False
        self._messages: Channel[Any] = Channel(1000)
        self._problem = ""  # the latest one; it may be temporary

    def send(self, message: Any) -> None:
        self._messages.put(message)

    def send_token(self, stream: int, token_id: int, data: bytes) -> None:
        pass  # only the end is waited for

    def close(self) -> None:
        self.closed = True

    def abort(self, reason: str) -> None:
        self.closed = True

    async def submit(self, bus: Bus, subject: str, request: GenerateRequest) -> None:
        """Returns when the request is answered. Sends it again until then; a worker runs it only once.

        Raises:
            InternalError: the request was refused or failed, or there was no answer in time.
        """
        payload = requests.encode(request)
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    try:
                        async with bus.mailbox(self._replied) as mailbox:
                            await mailbox.post(subject, payload, request.stream)
                            if await self._finished():
                                return
                    except ClusterError as error:
                        self._problem = str(error)
                        await asyncio.sleep(AGAIN)
                    log.info(
                        "%s: no answer yet, sending the request again %s",
                        request.id,
                        self._problem and f"({self._problem})",
                    )
        except TimeoutError:
            why = f": {self._problem}" if self._problem else ""
            raise InternalError(f"the {request.id} took longer than {TIMEOUT:.0f} s{why}") from None

    def _replied(self, stream: int, payload: bytes | None) -> None:
        """Handles a reply of the bus: an acknowledgement, or None when the subject is not served."""
        if payload is None:
            self._problem = "no process serves this worker's subject on NATS"
        elif (ack := decoded(requests.decode_ack, payload, "an acknowledgement")) is not None:
            self.send(SubmitReply(stream, ack))

    async def _finished(self) -> bool:
        """Waits for the answer. Returns False when none came within `AGAIN` seconds and the request may be lost.

        Raises:
            InternalError: the request was refused or failed.
        """
        deadline = asyncio.get_running_loop().time() + AGAIN
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    messages = await self._messages.receive()
            except TimeoutError:
                return False
            for message in messages:
                match message:
                    case Finished():
                        return True
                    case SubmitReply(ack=ack) if not isinstance(ack, Accepted):
                        raise InternalError(f"this worker refused its own request: {_in_words(ack)}")
                    case Failed(message=text):
                        raise InternalError(f"this worker's own request failed: {text}")


def _in_words(ack: Ack) -> str:
    return ack.message if isinstance(ack, Refused) else type(ack).__name__.lower()
