"""The API key before every path of vLLM's server, as a middleware that the server loads.

vLLM 0.32 asks for its key below `/v1`, `/v2`, `/inference` and `/cohere` only: `/invocations`,
which completes as `/v1/completions` does, `/tokenize`, `/metrics` and others answer everybody.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
# What load balancers ask, and says nothing but that the server runs.
OPEN = ("/health",)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 to requests without `Authorization: Bearer KEY`.

    Open are OPEN, and OPTIONS, which browsers send before a request and without its headers.
    """

    def __init__(self, app: App) -> None:
        """Take the key from the environment, where no other user of the machine sees it.

        Raises:
            KeyError: there is none.
        """
        self.app = app
        self._key = os.environ[KEY_VARIABLE].encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what may pass; anything but requests (the server's own start) does."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _may_pass(self, scope: Message) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN or scope.get("method") == "OPTIONS":
            return True
        shown = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = shown.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
