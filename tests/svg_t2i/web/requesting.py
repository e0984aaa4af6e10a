"""Requests to the page, and waiting for its answers."""

from __future__ import annotations

import json
import time
from urllib import request


def call(address, name, data, **options):
    """One request of the page's interface, as anyone can send it. -> what it answers."""
    post = request.Request(f"{address}gradio_api/call/{name}", json.dumps({"data": data}).encode(), **options)
    post.add_header("Content-Type", "application/json")
    with request.urlopen(post, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with request.urlopen(f"{address}gradio_api/call/{name}/{event}", timeout=30) as answer:
        return answer.read().decode()


def wait_for(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")
