"""Draw docs/images/page-*.png: the page of a running server, in Debian's Chromium.

python serve.py --checkpoint sphinx_jax/shipped/nano &
python docs/draw_page.py http://127.0.0.1:8000

The answers about the shapes are the shipped nano's. The grounded answers are written here: nano was not trained to
name places, and SPHINX-MoE answers in this form.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, sync_playwright

from sphinx_jax.data import easy_vqa

IMAGES = Path(__file__).parent / "images"
SCALE = 3

GROUNDED = (
    "A calm harbour in the morning. <p>A sailing boat with a red hull</p>[0.215, 0.464, 0.420, 0.731] leads "
    "<p>a smaller one</p>[0.562, 0.500, 0.675, 0.652] past <p>a lighthouse</p>[0.880, 0.309, 0.955, 0.562], and "
    "<p>gulls</p>[0.386, 0.317, 0.436, 0.352; 0.423, 0.280, 0.474, 0.306; 0.464, 0.311, 0.516, 0.338] circle below "
    "<p>the sun</p>[0.716, 0.237, 0.826, 0.346]."
)


def harbour() -> Image.Image:
    """The scene that GROUNDED describes, 960 x 640 pixels, drawn larger for smooth edges."""
    image = Image.new("RGB", (960 * SCALE, 640 * SCALE), "#b5d3df")
    draw = ImageDraw.Draw(image)

    def polygon(colour: str, *points: tuple[float, float]) -> None:
        draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=colour)

    draw.ellipse([v * SCALE for v in (690, 70, 790, 170)], fill="#f6d27a")
    polygon("#7fa08f", (0, 400), (0, 300), (180, 220), (330, 300), (520, 250), (700, 330), (960, 290), (960, 400))
    polygon("#5c8273", (0, 420), (0, 350), (240, 310), (420, 380), (960, 360), (960, 420))
    polygon("#3f7d96", (0, 400), (960, 400), (960, 640), (0, 640))
    for y in range(430, 640, 26):
        for x in range((y * 37) % 90 - 40, 960, 150):
            polygon("#6aa3b8", (x, y), (x + 60, y), (x + 60, y + 2), (x, y + 2))
    polygon("#4a4f4c", (770, 430), (960, 430), (960, 380), (840, 365), (790, 395))
    polygon("#f4efe6", (850, 375), (858, 190), (902, 190), (910, 375))
    polygon("#c4473a", (853, 310), (855, 260), (905, 260), (907, 310))
    polygon("#35424a", (852, 165), (908, 165), (908, 192), (852, 192))
    polygon("#ffe9a8", (862, 168), (898, 168), (898, 189), (862, 189))
    polygon("#c4473a", (848, 166), (912, 166), (880, 138))
    for x, y, size, hull, sail in ((300, 500, 1.25, "#a53a2c", "#f7f4ec"), (590, 440, 0.7, "#24455c", "#e6b04b")):
        outline = ((-70, 0), (80, 0), (55, 34), (-48, 34))
        polygon(hull, *((x + dx * size, y + dy * size) for dx, dy in outline))
        polygon("#3b2f2a", (x - 2, y), (x - 2, y - 165 * size), (x + 2, y - 165 * size), (x + 2, y))
        polygon(sail, *((x + dx * size, y + dy * size) for dx, dy in ((6, -160), (6, -14), (74, -14))))
        polygon("#f7f4ec", *((x + dx * size, y + dy * size) for dx, dy in ((-6, -140), (-6, -14), (-58, -14))))
    for x, y in ((430, 120), (470, 150), (395, 165)):
        for left in (x - 22, x):
            draw.arc([v * SCALE for v in (left, y - 8, left + 22, y + 12)], 195, 345, fill="#35424a", width=3 * SCALE)
    return image.resize((960, 640), Image.Resampling.LANCZOS)


def stream(text: str) -> str:
    """An answer's body, without the counts and times that only a model has."""
    chunks = [{"delta": {"content": text}}, {"delta": {}, "finish_reason": "stop"}]
    return "".join(f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def visit(browser: Browser, address: str, image: Path, **options) -> Page:
    """The page with an image, once it can be asked."""
    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.goto(address)
    page.wait_for_selector("#plate:visible")
    page.set_input_files("#pick-file", image)
    page.wait_for_selector("#stage:visible")
    return page


def ask(page: Page, question: str, answer: str | None = None) -> None:
    """Ask the model, or let `answer` be its answer."""
    if answer is not None:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream(answer)))
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#send:visible")


def main() -> None:
    address = sys.argv[1]
    IMAGES.mkdir(exist_ok=True)
    scene = IMAGES / "harbour.png"
    harbour().save(scene)
    describe = "Describe the image concisely. Include the bounding box for each mentioned object."
    laptop, phone = {"viewport": {"width": 1280, "height": 800}}, {"viewport": {"width": 390, "height": 844}}
    touch = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        page = visit(browser, address, easy_vqa.image_file("test", 3), **laptop)
        for question in ("What shape is in the image?", "What is the colour of the shape?"):
            ask(page, question)
        page.click("#parameters-button")
        page.screenshot(path=IMAGES / "page-desktop.png")

        page = visit(browser, address, scene, **laptop)
        ask(page, describe, GROUNDED)
        page.screenshot(path=IMAGES / "page-grounded.png")

        page = visit(browser, address, scene, color_scheme="dark", **laptop)
        ask(page, describe, GROUNDED)
        page.locator(".legend-row").nth(2).focus()
        page.screenshot(path=IMAGES / "page-dark.png")

        page = visit(browser, address, scene, **phone, **touch)
        ask(page, describe, GROUNDED)
        page.screenshot(path=IMAGES / "page-phone.png")
        browser.close()
    scene.unlink()


if __name__ == "__main__":
    main()
