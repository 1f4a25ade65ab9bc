"""A user's program on some host of the cluster: finds the router in the run directory and sends prompts.

python asking.py RUN PROMPT... prints one JSON object per prompt
"""

import json
import sys

from hpc_router.client import openai_client


def main() -> None:
    client = openai_client(sys.argv[1], max_retries=0)
    for prompt in sys.argv[2:]:
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": prompt}]
        )
        headers = {name: raw.headers[name] for name in ("x-expert", "x-replica", "x-route-reason")}
        print(json.dumps({**headers, "answer": raw.parse().choices[0].message.content}))


if __name__ == "__main__":
    main()
