"""Boxes, points and tables of answers, and regions in questions: compared with pixels of the screen and with numpy."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.server.page.browser import CHAT, ScriptedAnswers, png, sse, until, upload

pytestmark = pytest.mark.browser

WIDE, TALL = (600, 240), (240, 600)

# The colours of the first two marks in light, from page.css.
MARK_COLOURS = {1: (0xC0, 0x16, 0x3B), 2: (0x1A, 0x5B, 0xC2)}

# COCO's key points and skeleton (1-based), from its published annotation format.
KEY_POINTS = [
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
]
SKELETON = [
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10), (9, 11)),
    *((2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
]


def pixels(numbers, size):
    """Where fractions of the padded square are in an image: numpy, from the original's formula."""
    side = max(size)
    origin = (side - np.array(size)) // 2
    return (np.reshape(numbers, (-1, 2)) * side - origin).ravel()


@pytest.fixture
def answer(visit, ask):
    """answer(text, size) -> the page with a plain image of `size` and an answer of the model."""

    def open_page(text, size=WIDE, **options):
        page = visit(**options)
        ScriptedAnswers(page, sse(text))
        page.set_input_files("#pick-file", upload(png(size)))
        page.wait_for_selector("#stage:visible")
        ask(page, "Where?")
        page.mouse.move(0, 0)
        return page

    return open_page


def colour_bounds(page, colour):
    """The rectangle, in pixels of the image, that the pixels of a colour span on the screen."""
    shot = np.asarray(Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")).astype(int)
    y, x = np.nonzero((np.abs(shot - colour) < 24).all(-1))
    width = page.evaluate("document.getElementById('image').naturalWidth")
    scale = width / shot.shape[1]
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) * scale


@pytest.mark.parametrize("size", [WIDE, TALL, (300, 300), (301, 64)], ids=str)
def test_boxes_are_drawn_where_the_model_means(answer, size):
    """A box's line on the screen surrounds the pixels that the original's formula gives."""
    box = [0.35, 0.42, 0.61, 0.57]
    page = answer(f"<p>It</p>[{', '.join(map(str, box))}]", size)
    page.evaluate("document.getElementById('badges').hidden = true")
    expected = pixels(box, size)
    drawn = page.locator("#overlay rect.line").evaluate(
        "rect => ['x', 'y', 'width', 'height'].map((name) => Number(rect.getAttribute(name)))"
    )
    np.testing.assert_allclose([*drawn[:2], drawn[0] + drawn[2], drawn[1] + drawn[3]], expected, atol=1e-6)
    # A line of 2.5 pixels on the screen, its middle on the box's edge.
    scale = size[0] / page.locator("#stage").bounding_box()["width"]
    np.testing.assert_allclose(
        colour_bounds(page, MARK_COLOURS[1]), expected + scale * np.array([-1.25, -1.25, 1.25, 1.25]), atol=2 * scale
    )


@pytest.mark.parametrize("size", [WIDE, TALL], ids=str)
def test_points_are_drawn_where_the_model_means(answer, size):
    point = [0.4, 0.55]
    page = answer("<p>one</p>[0.3, 0.5, 0.4, 0.6] and <p>two</p>[0.4, 0.55]", size)
    page.evaluate("document.getElementById('badges').hidden = true")
    bounds = colour_bounds(page, MARK_COLOURS[2])
    scale = size[0] / page.locator("#stage").bounding_box()["width"]
    np.testing.assert_allclose((bounds[:2] + bounds[2:]) / 2, pixels(point, size), atol=1.5 * scale)
    np.testing.assert_allclose(bounds[2:] - bounds[:2], 9 * scale, atol=2 * scale)


def test_name_list_and_box_are_one(answer):
    """Same number, same colour, and the pointer or the focus on one lights the others and no more."""
    page = answer("<p>a dog</p>[0.1, 0.45, 0.3, 0.6] and <p>cats</p>[0.5, 0.45, 0.6, 0.6; 0.7, 0.45, 0.8, 0.6].")
    assert page.inner_text(".answer") == "a dog1 and cats2."
    assert [" ".join(row.split()) for row in page.locator(".legend-row").all_inner_texts()] == [
        "1 a dog 0.100, 0.450, 0.300, 0.600",
        "2.1 cats 0.500, 0.450, 0.600, 0.600",
        "2.2 cats 0.700, 0.450, 0.800, 0.600",
    ]
    assert sorted(page.locator(".badge").all_inner_texts()) == ["1", "2.1", "2.2"]
    colours = page.evaluate(
        """() => [".name[data-mark$='-2'] .name-text", ".legend-row[data-mark$='-2.1'] .legend-name",
                  "g[data-mark$='-2.1'] .line"].map((selector) => {
             const style = getComputedStyle(document.querySelector(selector));
             return style.stroke === "none" ? style.color : style.stroke;
           })"""
    )
    assert set(colours) == {"rgb(26, 91, 194)"}
    lit = "[...document.querySelectorAll('.lit')].map((marked) => marked.dataset.mark.replace(/^\\d+-/, '')).sort()"
    page.hover(".name[data-mark$='-2']")
    assert page.evaluate(lit) == ["2", *["2.1"] * 3, *["2.2"] * 3]
    page.locator(".legend-row").nth(2).focus()
    assert page.evaluate(lit) == ["2", "2.2", "2.2", "2.2"]
    page.locator(".legend-row").nth(0).hover()
    page.locator("#overlay g[data-mark$='-1.1']").hover()
    assert page.evaluate(lit) == ["1", "1.1", "1.1", "1.1"]


def test_an_earlier_answer_is_shown_when_it_is_pointed_at(visit, ask):
    page = visit()
    ScriptedAnswers(page, sse("<p>a</p>[0.1, 0.45, 0.3, 0.6]"), sse("<p>b</p>[0.2, 0.5]"), sse("none"))
    page.set_input_files("#pick-file", upload(png(WIDE)))
    for question in ("one", "two", "three"):
        ask(page, question)
    assert page.locator("#overlay g").count() == 0 and not page.is_visible("#hide-marks")
    page.locator(".legend-row").first.focus()
    assert page.locator("#overlay rect.line").count() == 1 and page.locator("#overlay path.line").count() == 0
    page.click("#hide-marks")
    assert not page.is_visible("#overlay rect.line")


def test_region_of_the_question_is_shown_with_the_answer(visit, ask):
    page = visit()
    ScriptedAnswers(page, sse("A dog."), sse("None."))
    page.set_input_files("#pick-file", upload(png(WIDE)))
    box = [0.2, 0.4, 0.5, 0.6]
    ask(page, f"What is in {box}?")
    drawn = page.locator("#overlay .asked .line").bounding_box()
    stage = page.locator("#stage").bounding_box()
    scale = stage["width"] / WIDE[0]
    corner = [(drawn["x"] - stage["x"]) / scale, (drawn["y"] - stage["y"]) / scale]
    np.testing.assert_allclose(corner, pixels(box, WIDE)[:2], atol=2)
    ask(page, "And elsewhere?")
    assert page.locator("#overlay g").count() == 0


def test_a_click_on_a_box_or_a_name_goes_to_its_line(answer):
    page = answer("<p>a dog</p>[0.1, 0.45, 0.3, 0.6] and <p>cats</p>[0.5, 0.45, 0.6, 0.6; 0.7, 0.45, 0.8, 0.6].")
    page.locator("#overlay g[data-mark$='-2.2']").click()
    assert page.evaluate("document.activeElement.dataset.mark.slice(-4)") == "-2.2"
    page.click(".name >> nth=0")
    assert page.evaluate("document.activeElement.dataset.mark.slice(-4)") == "-1.1"


def test_key_points_are_joined_by_the_skeleton(answer):
    """Two people, one after the other, the second without a nose: no line goes between them."""
    rng = np.random.default_rng(0)
    people = [rng.uniform(0.35, 0.65, (17, 2)).round(3) for _ in range(2)]
    text = ", ".join(
        f"<p>{name.replace('_', ' ')}</p>[{x}, {y}]"
        for number, places in enumerate(people)
        for name, (x, y) in zip(KEY_POINTS[number:], places[number:].tolist(), strict=True)
    )
    page = answer(text)
    drawn = page.locator("#overlay .bone line.line").evaluate_all(
        "lines => lines.map((line) => ['x1', 'y1', 'x2', 'y2'].map((name) => Number(line.getAttribute(name))))"
    )
    edges = [
        pixels([places[a - 1], places[b - 1]], WIDE)
        for number, places in enumerate(people)
        for a, b in SKELETON
        if not number or 1 not in (a, b)
    ]
    in_order = [sorted(edge.reshape(2, 2).tolist()) for edge in edges]
    found = [sorted(np.reshape(line, (2, 2)).tolist()) for line in drawn]
    np.testing.assert_allclose(sorted(found), sorted(in_order), atol=1e-6)


REGIONS = {
    "[0.1, 0.2, 0.3, 0.4]": [[0.1, 0.2, 0.3, 0.4]],
    "<p>x</p> [0.1,0.2;0.3,0.4]": [[0.1, 0.2], [0.3, 0.4]],
    "<p>x</p>[0.000, 0.2, 1.000, 1]": [[0, 0.2, 1, 1]],
    "see [1] and [2, 3]": [],
    "[0.1, 0.2, 0.3]": [],
    "[3.14, 2.72]": [],
    "[]": [],
    "[0.1.2, 0.3]": [],
    "[0.1, 0.2, 0.3, 0.4; 0.5]": [[0.1, 0.2, 0.3, 0.4]],
    "[\n0.1, 0.2]": [[0.1, 0.2]],
}


def test_what_is_a_region(visit):
    script = """async (texts) => {
      const { parseMarks } = await import("/page/regions.js");
      return texts.map((text) => parseMarks(text).flatMap((mark) => mark.groups));
    }"""
    found = visit().evaluate(script, list(REGIONS))
    assert dict(zip(REGIONS, found, strict=True)) == REGIONS


def test_text_without_regions_stays_as_it_is(answer):
    text = "see [1], [2, 3] and [x1, y1, x2, y2] <p>here</p>"
    page = answer(text)
    assert page.inner_text(".answer") == text
    assert page.locator("#overlay g").count() == 0 and not page.is_visible(".legend")


# Regions in the question


def drag(page, start, end, size):
    """Drag over the image, from and to places in its pixels."""
    box = page.locator("#stage").bounding_box()
    scale = box["width"] / size[0]
    page.mouse.move(box["x"] + start[0] * scale, box["y"] + start[1] * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * scale, box["y"] + end[1] * scale, steps=4)
    page.mouse.up()


def with_image(page, size):
    page.set_input_files("#pick-file", upload(png(size)))
    page.wait_for_selector("#stage:visible")
    return page


@pytest.mark.parametrize("size", [WIDE, TALL], ids=str)
def test_dragged_region_goes_into_the_question(visit, size):
    """As fractions of the padded square, three decimals; dragged anew, it takes the place of the first."""
    page = with_image(visit(), size)
    page.locator("#empty-tasks .task").nth(7).click()
    side, origin = max(size), (max(size) - np.array(size)) // 2
    for start, end in [((30, 60), (180, 200)), ((200, 220), (90, 100))]:
        drag(page, start, end, size)
        question = page.input_value("#question")
        found = re.fullmatch(r"Detect the key points of the person in the region \[(.*)\]\.", question)
        assert found is not None
        assert re.fullmatch(r"\d\.\d{3}(, \d\.\d{3}){3}", found[1])
        corners = np.sort([start, end], axis=0)
        expected = ((corners + origin) / side).ravel()
        scale = size[0] / page.locator("#stage").bounding_box()["width"]
        np.testing.assert_allclose([float(x) for x in found[1].split(",")], expected, atol=0.0006 + scale / side)
    assert page.is_visible("#frame")
    page.fill("#question", "What is there?")
    assert not page.is_visible("#frame")


def test_region_stays_within_the_image_and_clicks_are_none(visit):
    page = with_image(visit(), WIDE)
    drag(page, (300, 100), (302, 101), WIDE)
    assert page.input_value("#question") == ""
    page.fill("#question", "What is in?")
    page.locator("#question").evaluate("field => field.setSelectionRange(10, 10)")
    drag(page, (300, 120), (5000, -5000), WIDE)
    assert page.input_value("#question") == "What is in [0.500, 0.300, 1.000, 0.500]?"


def test_region_by_keyboard_alone(visit):
    """The same as a drag: move, resize, Enter; and what the frame is, is said."""
    page = with_image(visit(), WIDE)
    page.focus("#mark-region")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "frame"
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft", "Alt+ArrowRight", "Alt+ArrowRight"):
        page.keyboard.press(key)
    # From the middle half of the image: x from 150 to 450 and y from 60 to 180 of 600 x 240 pixels.
    x1, y1, x2, y2 = 150 + 12 + 1.2, 60 + 12, 450 + 12 - 12 + 1.2, 180 + 12
    expected = [x1 / 600, (y1 + 180) / 600, x2 / 600, (y2 + 180) / 600]
    until(lambda: page.text_content("#action-announcer") == f"[{', '.join(f'{number:.3f}' for number in expected)}]")
    page.keyboard.press("Enter")
    assert page.input_value("#question") == f"[{', '.join(f'{number:.3f}' for number in expected)}]"
    assert page.evaluate("document.activeElement.id") == "question"
    page.focus("#mark-region")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "mark-region" and not page.is_visible("#frame")


def test_fingers_scroll_until_region_marking_is_on(visit):
    """A touch that drags over the image draws only after Mark region."""
    page = with_image(visit(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844}), WIDE)
    touch = page.context.new_cdp_session(page)

    def swipe():
        box = page.locator("#stage").bounding_box()
        for kind, (x, y) in (("Start", (40, 30)), ("Move", (120, 60)), ("Move", (200, 100)), ("End", (0, 0))):
            points = [] if kind == "End" else [{"x": box["x"] + x, "y": box["y"] + y}]
            touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
        return page.input_value("#question")

    def marking():
        return page.get_attribute("#mark-region", "aria-pressed") == "true"

    def tapped():
        if not marking():
            page.tap("#mark-region")
            page.wait_for_timeout(500)
        return marking()

    assert swipe() == ""
    # Again, where the first touch only ended the scrolling.
    until(tapped)
    until(lambda: swipe().startswith("[0.1"))


# Markdown and tables


MARKDOWN = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "## Title\n- a\ntext": '<p class="heading">Title</p><ul><li>a</li></ul><p>text</p>',
    "2. a\n3. b": '<ol start="2"><li>a</li><li>b</li></ol>',
    "1) **b**\n\n***": '<ol start="1"><li><strong>b</strong></li></ol><p>***</p>',
    "```python\na < *b*\n```": '<pre tabindex="0"><code>a &lt; *b*</code></pre>',
    "```\nnever closed": '<pre tabindex="0"><code>never closed</code></pre>',
    "`x*y*z` 2 * 3 * 4 *so*": "<p><code>x*y*z</code> 2 * 3 * 4 <em>so</em></p>",
    "**never closed `nor this": "<p>**never closed `nor this</p>",
    "[link](javascript:alert(1)) ![i](http://x/y)": "<p>[link](javascript:alert(1)) ![i](http://x/y)</p>",
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "Yes | no": "<p>Yes | no</p>",
    "Salt & pepper": "<p>Salt &amp; pepper</p>",
    "": "",
}


def test_markdown(visit):
    script = """async (texts) => {
      const { renderMarkdown } = await import("/page/markdown.js");
      return texts.map((text) => {
        const made = document.createElement("div");
        made.append(renderMarkdown(text));
        return made.innerHTML;
      });
    }"""
    found = visit().evaluate(script, list(MARKDOWN))
    assert dict(zip(MARKDOWN, found, strict=True)) == MARKDOWN


@pytest.mark.parametrize(
    "text",
    [
        "| Year | Boats |\n| --- | ---: |\n| 2019 | 128 |\n| 2020 | 9.5% |",
        "Year | Boats\n2019 | 128\n2020 | 9.5%",
        "Year | Boats <0x0A> 2019 | 128 <0x0A> 2020 | 9.5%",
        "Year | Boats & 2019 | 128 & 2020 | 9.5%",
    ],
    ids=["markdown", "lines", "line feed tokens", "ampersands"],
)
def test_chart_answers_are_tables(answer, text):
    page = answer(text)
    rows = page.locator(".answer tr").evaluate_all("rows => rows.map((row) => [...row.cells].map((c) => c.innerText))")
    assert rows == [["Year", "Boats"], ["2019", "128"], ["2020", "9.5%"]]
    assert page.locator(".answer thead th").count() == 2


ATTACK = "\n\n".join(
    [
        "<script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked = 1'>",
        "<p><img src=x onerror='window.hacked = 1'></p>[0.1, 0.2, 0.3, 0.4]",
        "**<svg onload='window.hacked = 1'>** `<b>` | <i>",
        "[x](javascript:window.hacked=1)",
        "</li></ol><iframe src='javascript:window.hacked=1'></iframe>",
    ]
)


@pytest.fixture
def attacked(visit, ask):
    """attacked(where) -> a page that shows the attack there, and the selector of what shows it."""
    name = ATTACK.replace("/", "").replace("\n", " ")

    def open_page(where):
        page = visit()
        page.route(CHAT, lambda route: route.fulfill(status=400, json={"error": {"message": ATTACK}}))
        if where == "error":
            ask(page, "x")
            return page, ".error"
        if where == "state":
            page.route("**/health", lambda route: route.fulfill(status=503, json={"status": name, "progress": name}))
            page.reload()
            until(lambda: "window" in page.inner_text("#state-text"))
            return page, "#state-text"
        page.set_input_files("#pick-file", upload(png((60, 40)), f"{name}.png"))
        page.wait_for_selector("#stage:visible")
        if where == "file name":
            page.set_input_files("#pick-file", upload(b"x", name, "text/plain"))
            page.wait_for_selector("#notice:visible")
            assert "window.hacked" in page.inner_text("#image-name")
            return page, "#notice"
        ScriptedAnswers(page, sse(ATTACK))
        ask(page, ATTACK)
        return page, f".{where}"

    return open_page


@pytest.mark.parametrize("where", ["answer", "question", "error", "file name", "state"])
def test_text_never_becomes_markup(attacked, where):
    """What model, user, server and files say stays text, whatever it looks like."""
    page, shown = attacked(where)
    text = page.locator(shown).last.inner_text()
    assert "window.hacked = 1" in text and "iframe src" in text
    inside = f"{shown} :is(script, img, svg, iframe, a, b, i)"
    assert page.locator(inside).count() == 0 and page.locator("iframe, script:not([src])").count() == 0
    assert page.evaluate("window.hacked") is None


def test_events_are_read_whatever_their_pieces(visit):
    """The data of a stream that is cut at every byte, with LF or CRLF, comments and characters of several bytes."""
    script = """async (text) => {
      const { events } = await import("/page/events.js");
      const bytes = new TextEncoder().encode(text);
      const results = new Set();
      for (let cut = 0; cut <= bytes.length; cut += 1) {
        const pieces = [bytes.slice(0, cut), bytes.slice(cut)];
        const body = new ReadableStream({
          pull(controller) {
            if (pieces.length) controller.enqueue(pieces.shift());
            else controller.close();
          },
        });
        const found = [];
        for await (const data of events(body)) found.push(data);
        results.add(JSON.stringify(found));
      }
      return [...results];
    }"""
    text = (
        ': ping\n\ndata: {"a": "é"}\n\ndata:two\r\n\r\nevent: x\ndata: three\ndata: lines\n\n: ping\n\ndata: [DONE]\n\n'
    )
    expected = '["{\\"a\\": \\"é\\"}","two","three\\nlines","[DONE]"]'
    assert visit().evaluate(script, text) == [expected]
