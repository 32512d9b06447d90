"""Talks to a server in constant memory with the `openai` package.

    tova-mlx serve --max-kv-size 1024 --port 8080
    python examples/openai_client.py "Why is the sky blue?" "And at sunset?"

Each argument is a turn of one conversation. The server finds the cache of what was said
before, so that a turn reads only what is new.
"""

import argparse
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()

    client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="not needed")
    messages: list[Any] = []
    for question in args.questions:
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model="default_model",
            messages=messages,
            max_tokens=args.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        answer = ""
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
                answer += choice.delta.content or ""
            if chunk.usage:
                details = chunk.usage.prompt_tokens_details
                known = details.cached_tokens if details else 0
                print(
                    f"\n  [{chunk.usage.prompt_tokens} tokens, {known} of them known]"
                )
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
