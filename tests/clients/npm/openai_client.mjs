// The official OpenAI client for JavaScript.
import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'
import { BASE_URL, MESSAGES, QUESTION, TOKEN, left, outcomeOf, run, waits } from './cases.mjs'

const client = new OpenAI({ baseURL: BASE_URL, apiKey: TOKEN, maxRetries: 0 })
const City = z.object({ name: z.string(), founded: z.number().int().min(1000), tags: z.array(z.string()).min(2) })
const parameters = { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'] }
const tools = [{ type: 'function', function: { name: 'add', parameters } }]

const ask = (model, options = {}, own = client) => own.chat.completions.create({ model, messages: MESSAGES, ...options })

async function said(model, options) {
  return (await ask(model, options)).choices[0].message.content
}

async function streamed(model) {
  let text = ''
  for await (const chunk of await ask(model, { stream: true })) text += chunk.choices[0]?.delta.content ?? ''
  return text
}

async function cut() {
  let text = ''
  try {
    for await (const chunk of await ask('broken', { stream: true })) text += chunk.choices[0]?.delta.content ?? ''
  } catch (error) {
    return [text.trim().split(' ').length, outcomeOf(error), error.message]
  }
  return [text]
}

async function abandoned() {
  const stream = await ask('endless', { stream: true })
  for await (const _ of stream) break
  return [await left('endless')]
}

async function aborted() {
  const stopping = new AbortController()
  const asked = client.chat.completions.create({ model: 'slow', messages: MESSAGES }, { signal: stopping.signal })
  setTimeout(() => stopping.abort(), 300)
  return [await asked.catch(outcomeOf), await left('slow')]
}

await run({
  models: async () => (await client.models.list()).data.map((model) => model.id).sort(),
  chat: async () => (await said('math')) === (await streamed('math')),
  tool: async () => (await ask('math', { tools, tool_choice: 'required' })).choices[0].message.tool_calls[0].function,
  parsed: async () => {
    const response_format = zodResponseFormat(City, 'city')
    return (await client.chat.completions.parse({ model: 'math', messages: MESSAGES, response_format })).choices[0].message.parsed
  },
  parsed_response: async () => {
    const format = zodTextFormat(City, 'city')
    return (await client.responses.parse({ model: 'math', input: QUESTION, text: { format } })).output_parsed
  },
  response_stream: async () => {
    let text = ''
    let last
    for await (const event of await client.responses.create({ model: 'math', input: QUESTION, stream: true })) {
      if (event.type === 'response.output_text.delta') text += event.delta
      last = event
    }
    return [last.type, text !== '' && text === last.response.output[0].content[0].text]
  },
  embeddings: async () => (await client.embeddings.create({ model: 'math', input: ['a', 'b'] })).data.length,
  wrong_token: () => ask('math', {}, client.withOptions({ apiKey: 'wrong' })),
  unknown: () => ask('poetry'),
  busy: () => ask('busy'),
  away: () => ask('away'),
  recovering: () => waits(async () => (await ask('recovering', {}, client.withOptions({ maxRetries: 1 }))).id !== ''),
  slow: () => ask('slow', {}, client.withOptions({ maxRetries: 2 })),
  cut,
  abandoned,
  aborted,
})
