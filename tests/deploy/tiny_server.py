"""What of `rtap serve` a replica relies on, without a model: readiness, a reply, a stream, an end in the middle of one.

Run with ``--uds PATH``. /seen: how many clients have left a stream early."""

import asyncio
import os
import sys

from aiohttp import web

left = 0


async def ready(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def echo(request: web.Request) -> web.Response:
    body = {"body": await request.text(), "query": request.query_string, "key": request.headers.get("authorization")}
    return web.json_response(body, status=202, headers={"Retry-After": "7"})


async def stream(request: web.Request) -> web.StreamResponse:
    """One event, then silence until the client leaves."""
    global left
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    await reply.write(b"data: 1\n\n")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        left += 1
        raise
    return reply


async def seen(_: web.Request) -> web.Response:
    return web.Response(text=str(left))


async def die(request: web.Request) -> web.StreamResponse:
    """The head, half of the body, and the end of the process."""
    reply = web.StreamResponse(headers={"Content-Length": "10"})
    await reply.prepare(request)
    await reply.write(b"half")
    os._exit(9)


if __name__ == "__main__":
    if "--fail" in sys.argv:
        sys.exit(2)
    app = web.Application()
    app.add_routes(
        [web.get("/ready", ready), web.get("/live", ready), web.post("/echo", echo), web.post("/stream", stream)]
    )
    app.add_routes([web.get("/seen", seen), web.post("/die", die)])
    path = sys.argv[sys.argv.index("--uds") + 1]
    web.run_app(app, path=path, handler_cancellation=True, print=None)
