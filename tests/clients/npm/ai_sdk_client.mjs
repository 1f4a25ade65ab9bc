// The AI SDK with its providers for compatible servers (chat) and for OpenAI (responses).
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { Output, embedMany, generateText, streamText, tool } from 'ai'
import { z } from 'zod'
import { BASE_URL, QUESTION, TOKEN, left, outcomeOf, run, waits } from './cases.mjs'

const provider = createOpenAICompatible({
  name: 'hpc-router', baseURL: BASE_URL, apiKey: TOKEN, supportsStructuredOutputs: true, includeUsage: true,
})
const plain = createOpenAICompatible({ name: 'hpc-router', baseURL: BASE_URL, apiKey: TOKEN })
const openai = createOpenAI({ baseURL: BASE_URL, apiKey: TOKEN })
const City = z.object({ name: z.string(), founded: z.number().int().min(1000), tags: z.array(z.string()).min(2) })
const add = tool({ inputSchema: z.object({ a: z.number().int() }), execute: async ({ a }) => a + 1 })

const ask = (model, options = {}) =>
  generateText({ model: provider(model), prompt: QUESTION, maxRetries: 0, ...options })

async function streamed(model) {
  let text = ''
  const errors = []
  const result = streamText({ model, prompt: QUESTION, maxRetries: 0, onError: ({ error }) => errors.push(error) })
  for await (const piece of result.textStream) text += piece
  return { text, errors, result }
}

async function cut() {
  const { text, errors } = await streamed(provider('broken'))
  return [text.trim().split(' ').length, errors.map((error) => error.message ?? error)]
}

async function aborted() {
  const stopping = new AbortController()
  const result = streamText({ model: provider('endless'), prompt: QUESTION, abortSignal: stopping.signal })
  for await (const _ of result.textStream) { stopping.abort(); break }
  return [await left('endless')]
}

await run({
  chat: async () => (await ask('math')).text === (await streamed(provider('math'))).text,
  usage: async () => (await (await streamed(provider('math'))).result.usage).outputTokens > 0,
  tool: async () => {
    const { toolCalls, toolResults } = await ask('math', { tools: { add }, toolChoice: 'required' })
    return [toolCalls[0].input, toolResults[0].output]
  },
  parsed: async () => (await ask('math', { output: Output.object({ schema: City }) })).output,
  parsed_without_option: async () =>
    (await ask('math', { model: plain('math'), output: Output.object({ schema: City }) })).output,
  responses: async () => (await generateText({ model: openai('math'), prompt: QUESTION })).text !== '',
  response_stream: async () => (await streamed(openai('math'))).text !== '',
  response_turns: async () => {
    const first = await generateText({ model: openai('math'), prompt: QUESTION })
    const messages = [{ role: 'user', content: QUESTION }, ...first.response.messages, { role: 'user', content: 'Why?' }]
    return (await generateText({ model: openai('math'), messages, maxRetries: 0 })).text !== ''
  },
  response_turns_unstored: async () => {
    const options = { providerOptions: { openai: { store: false } }, model: openai('math'), maxRetries: 0 }
    const first = await generateText({ ...options, prompt: QUESTION })
    const messages = [{ role: 'user', content: QUESTION }, ...first.response.messages, { role: 'user', content: 'Why?' }]
    return (await generateText({ ...options, messages })).text !== ''
  },
  embeddings: async () => (await embedMany({ model: provider.embeddingModel('math'), values: ['a', 'b'] })).embeddings.length,
  wrong_token: async () => {
    const other = createOpenAICompatible({ name: 'hpc-router', baseURL: BASE_URL, apiKey: 'wrong' })
    return (await ask('math', { model: other('math') })).text
  },
  unknown: () => ask('poetry'),
  busy: () => ask('busy'),
  away: () => ask('away'),
  recovering: () => waits(async () => (await ask('recovering', { maxRetries: 1 })).text !== ''),
  slow: () => ask('slow', { maxRetries: 2 }),
  cut,
  aborted,
})
