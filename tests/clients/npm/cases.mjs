// What the programs share: the endpoint, the question, and a report of what each case returned or threw. See
// tests/clients/programs/cases.py, which does the same in Python.

export const URL = process.env.CLIENTS_URL
export const BASE_URL = `${URL}/v1`
export const TOKEN = process.env.CLIENTS_TOKEN
export const QUESTION = `What is 6 x 7? (${process.env.CLIENTS_NAME})`
export const MESSAGES = [{ role: 'user', content: QUESTION }]

export async function run(cases) {
  const outcomes = {}
  for (const [name, one] of Object.entries(cases)) {
    outcomes[name] = await one().catch(outcomeOf)
  }
  console.log(JSON.stringify(outcomes))
}

// The class and the status of an error; of the last attempt, where a client wraps its errors.
export function outcomeOf(error) {
  const status = error.status ?? error.statusCode ?? error.lastError?.statusCode
  return status === undefined ? error.constructor.name : `${error.constructor.name} ${status}`
}

export async function waits(call) {
  const started = performance.now()
  return [await call(), performance.now() - started >= 1000]
}

// Whether the expert soon has no request in flight.
export async function left(expert) {
  for (const deadline = performance.now() + 20000; performance.now() < deadline; ) {
    const answer = await fetch(`${URL}/status`, { headers: { authorization: `Bearer ${TOKEN}` } })
    const { replicas } = (await answer.json()).experts[expert]
    if (replicas.every((replica) => replica.in_flight === 0)) return true
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  return false
}
