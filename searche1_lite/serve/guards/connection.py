"""uvicorn's connections, bounded in time: by when a request's headers are there, how long an answer may lie unread."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from searche1_lite.serve.guards.errors import error_response
from searche1_lite.serve.guards.guard import Limits, busy


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, which waits for a client's headers, and for it to read, as long as the client likes; bounded."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that anything unread is noticed
        if len(self.connections) > 2 * self._limits.connections:
            transport.abort()
        elif len(self.connections) > self._limits.connections:
            self.app = busy
        self._expect_head()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop(self._head_timer)

    def on_response_complete(self) -> None:
        self._expect_head()  # first: a request that has come already ends the waiting again
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop(self._read_timer)
        self._read_timer = self.loop.call_later(self._limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self._read_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._read_timer)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._end(400, "this is no HTTP request")

    def _expect_head(self) -> None:
        self._stop(self._head_timer)
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._end(408, "the headers did not come in time")
        else:
            self.transport.close()

    def _end(self, status: int, message: str) -> None:
        """Where there is no request yet that an application could answer."""
        response = error_response(status, message, {"connection": "close"})
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=status, headers=response.raw_headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
