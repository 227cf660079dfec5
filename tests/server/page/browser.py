"""What the tests of the page share: Chromium, images, and answers of a model that says what a test needs."""

import base64
import io
import json
import random
import re
import shutil
import time
from collections.abc import Callable

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

CHAT = "**/v1/chat/completions"


def png(size: tuple[int, int], colour: str = "#808080") -> bytes:
    """A plain image of `size`, width and height in pixels."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def noise(size: tuple[int, int]) -> bytes:
    """An image that does not compress."""
    data = io.BytesIO()
    image = Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3))
    image.save(data, "PNG", compress_level=0)
    return data.getvalue()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for a condition. Playwright's own `wait_for_function` needs eval, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.02)


def upload(data: bytes, name: str = "image.png", kind: str = "image/png") -> dict:
    """A file for playwright's `set_input_files`."""
    return {"name": name, "mimeType": kind, "buffer": data}


def sse(text: str, finish: str | None = "stop", tokens: int = 12) -> str:
    """The body of a streamed answer, a word a chunk; without `finish` it breaks off."""
    chunks: list[dict] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in re.findall(r"\S+\s*|\s+", text)]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        usage = {"prompt_tokens": 300, "completion_tokens": tokens, "total_tokens": 300 + tokens}
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if finish else "")


class ScriptedAnswers:
    """Answers a page's questions with the given SSE bodies, the last of them again and again.

    `requests` are the bodies that the page sent.
    """

    def __init__(self, page, *bodies: str):
        self.bodies, self.requests = list(bodies), []
        page.route(CHAT, self._answer)

    def _answer(self, route) -> None:
        self.requests.append(json.loads(route.request.post_data))
        body = self.bodies.pop(0) if len(self.bodies) > 1 else self.bodies[0]
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    def image(self, number: int = -1) -> bytes:
        """The bytes of the image in a request."""
        url = self.requests[number]["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/")
        return base64.b64decode(url.partition("base64,")[2])


LIVE_STREAM = """
// Answers that the test sends piece by piece: send(text), finish(reason), fail(), and whether the page left.
window.live = {aborted: false};
const fetchAnything = window.fetch;
window.fetch = (path, options = {}) => {
  if (!String(path).includes("chat/completions")) return fetchAnything(path, options);
  const encoder = new TextEncoder();
  let controller;
  const body = new ReadableStream({start(made) { controller = made; }});
  const put = (chunk) => controller.enqueue(encoder.encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
  options.signal.addEventListener("abort", () => {
    window.live.aborted = true;
    controller.error(options.signal.reason);
  });
  window.live.send = (content) => put({choices: [{index: 0, delta: {content}}]});
  window.live.fail = () => controller.error(new TypeError("network error"));
  window.live.finish = (finish_reason = "stop") => {
    put({choices: [{index: 0, delta: {}, finish_reason}]});
    put({choices: [], usage: {prompt_tokens: 9, completion_tokens: 5, total_tokens: 14}});
    controller.close();
  };
  return Promise.resolve(new Response(body, {status: 200}));
};
"""
"""Takes the place of `fetch` for answers, so that a test sees the page while one arrives."""
