/**
 * Regions in the model's text: boxes and points, as fractions of the image padded to a square.
 *
 * `<p>name</p>[x1, y1, x2, y2; ...]` names them, a bare `[...]` does not. A group of four numbers is a box, of two a
 * point. The image is centred in the square, whose side is the image's longer side.
 */

/** A region with its optional name. Numbers have a decimal point, so that `[1]` stays a citation. */
export const MARK = /<p>([^<]*)<\/p>\s*\[([\d.,;\s]*)\]|\[([\d.,;\s]*)\]/g;

/** What the task's prompt has in the place of a region. */
export const PLACEHOLDER = "[x1, y1, x2, y2]";

/** The beginning of a region at the end of a text that is still arriving. */
const UNFINISHED = /(?:<p?|<p>[^<\n]*(?:<(?:\/p?)?)?|<p>[^<\n]*<\/p>\s*(?:\[[\d.,;\s]*)?|\[[\d.,;\s]*)$/;

const KEY_POINTS = [
  "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
  "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
  "right ankle",
];

/** COCO's edges between key points. */
const SKELETON = [
  ["right ankle", "right knee"], ["right knee", "right hip"], ["left ankle", "left knee"], ["left knee", "left hip"],
  ["right hip", "left hip"], ["left shoulder", "left hip"], ["right shoulder", "right hip"],
  ["left shoulder", "right shoulder"], ["left shoulder", "left elbow"], ["right shoulder", "right elbow"],
  ["left elbow", "left wrist"], ["right elbow", "right wrist"], ["left eye", "right eye"], ["nose", "left eye"],
  ["nose", "right eye"], ["left eye", "left ear"], ["right eye", "right ear"], ["left ear", "left shoulder"],
  ["right ear", "right shoulder"],
];

/** The boxes and points between brackets: arrays of 4 or 2 fractions; other groups are left out. */
function parseGroups(text) {
  return text.split(";").map(parseGroup).filter((group) => group !== null);
}

function parseGroup(text) {
  const parts = text.trim().split(/\s*,\s*|\s+/);
  const numbers = parts.map(Number);
  const isRegion = numbers.length === 2 || numbers.length === 4;
  const areFractions = numbers.every((number) => number >= 0 && number <= 1);
  return isRegion && areFractions && parts.some((part) => part.includes(".")) ? numbers : null;
}

/** All marks of a text in order: {name, groups}. */
export function parseMarks(text) {
  return [...text.matchAll(MARK)].map(markOf).filter((mark) => mark.groups.length > 0);
}

/** The mark of one match of MARK; without groups if its numbers are no regions. */
export function markOf(match) {
  return { name: match[1] ?? "", groups: parseGroups(match[2] ?? match[3]) };
}

/** A text that is still arriving, without the region that it breaks off in. */
export function withoutUnfinished(text) {
  return text.replace(UNFINISHED, "");
}

/** Side of the padded square in pixels, and the image's place in it. */
function square({ width, height }) {
  const side = Math.max(width, height);
  return { side, left: Math.floor((side - width) / 2), top: Math.floor((side - height) / 2) };
}

/** Pixels of the image from fractions of the square; both alternate x and y. */
export function toPixels(numbers, size) {
  const { side, left, top } = square(size);
  return numbers.map((number, i) => number * side - (i % 2 ? top : left));
}

/** Fractions of the square from pixels of the image. */
export function toFractions(pixels, size) {
  const { side, left, top } = square(size);
  return pixels.map((pixel, i) => (pixel + (i % 2 ? top : left)) / side);
}

/** A region as the model reads it: three decimals. */
export function formatRegion(numbers) {
  return `[${numbers.map((number) => number.toFixed(3)).join(", ")}]`;
}

/** Pairs of points to join, as fractions: the key points of each person by COCO's skeleton. */
export function skeletonEdges(marks) {
  return people(marks).flatMap((person) =>
    SKELETON.filter(([from, to]) => person.has(from) && person.has(to)).map(([from, to]) => [
      person.get(from),
      person.get(to),
    ]),
  );
}

export function isKeyPoint(name) {
  return KEY_POINTS.includes(keyPointName(name));
}

/** Maps from key point to place. A name that repeats begins the next person; so does each further point of a mark. */
function people(marks) {
  const found = [];
  let first = 0;
  for (const { name, groups } of marks.filter((mark) => isKeyPoint(mark.name))) {
    if (found[first]?.has(keyPointName(name))) first = found.length;
    groups.forEach((point, i) => {
      found[first + i] ??= new Map();
      if (point.length === 2) found[first + i].set(keyPointName(name), point);
    });
  }
  return found;
}

function keyPointName(name) {
  return name.trim().toLowerCase().replaceAll("_", " ");
}
