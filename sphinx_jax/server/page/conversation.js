/**
 * A conversation as data. A turn is {id, question, answer, status, error, statistics}; `status` is "streaming",
 * "complete", "stopped" or "failed".
 */

/** The turns whose answers the model is told of, and which are saved. */
export function answered(turns) {
  return turns.filter(({ answer, status }) => answer && status !== "failed" && status !== "streaming");
}

/** OpenAI messages that end with `question`; the image, if any, is part of the first. */
export function toMessages(turns, question, dataUrl) {
  const messages = answered(turns).flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answer },
  ]);
  messages.push({ role: "user", content: question });
  if (dataUrl) {
    messages[0].content = [
      { type: "image_url", image_url: { url: dataUrl } },
      { type: "text", text: messages[0].content },
    ];
  }
  return messages;
}

/** The records of a training file, as the chat's /save writes them. `image` is a path or null. */
export function toRecords(turns, image) {
  const conversations = answered(turns).flatMap(({ question, answer }) => [
    { from: "human", value: question },
    { from: "gpt", value: answer },
  ]);
  return [image === null ? { conversations } : { image, conversations }];
}

/**
 * {image, pairs, more} of a training file's first record: a path or null, [question, answer] pairs, and the number of
 * records after it. Raises Error with one sentence if the text is no such file.
 */
export function fromRecords(text) {
  let records;
  try {
    records = JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON; open one that this page or the chat's /save wrote.");
  }
  const [record, ...rest] = Array.isArray(records) ? records : [records];
  if (!Array.isArray(record?.conversations)) throw new Error('the file has no record with "conversations".');
  return { image: imageOf(record), pairs: pairsOf(record.conversations), more: rest.length };
}

function imageOf({ image = null }) {
  if (image !== null && typeof image !== "string") throw new Error('"image" must be the path of one image.');
  return image;
}

const ROLES = { human: "human", gpt: "gpt", assistant: "gpt" };

function pairsOf(conversations) {
  const pairs = [];
  conversations.forEach((turn, i) => {
    const role = ROLES[String(turn?.from).toLowerCase()];
    if (role !== (i % 2 ? "gpt" : "human") || typeof turn.value !== "string") {
      throw new Error(`turn ${i + 1} must have "from": "${i % 2 ? "gpt" : "human"}" and a text as "value".`);
    }
    if (i % 2) pairs.at(-1).push(turn.value);
    else pairs.push([turn.value.replaceAll("<image>", "").trim()]);
  });
  if (!pairs.length || pairs.at(-1).length < 2) throw new Error("its last question has no answer.");
  return pairs;
}

/** The last part of a path. */
export function baseName(path) {
  return path.split(/[\\/]/).at(-1);
}
