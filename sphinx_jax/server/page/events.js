/** Server-sent events of a response body: the data of each, whatever the pieces in which the bytes arrive. */

/** Yields the data of each event of a stream of bytes. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      const blocks = (rest + (done ? "\n\n" : value)).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data !== null) yield data;
      }
      if (done) return;
    }
  } finally {
    // Leaving early closes the connection.
    await reader.cancel().catch(() => {});
  }
}

/** The data lines of an event, joined; null for comments, such as the server's pings. */
function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
}
