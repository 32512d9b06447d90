"""Requests that no client should send, and what a server has to answer to each.

`scripts/abusers.py` sends them.
"""

import json
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Abuse:
    """A request as bytes, and the statuses that are right for it.

    ends: whether the client says that nothing more will come.
    """

    sent: bytes
    right: tuple[str, ...]
    ends: bool = False


def request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """The bytes of a request; its length is said unless the headers say one."""
    said = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if not any(h.lower().startswith("content-length") for h in headers):
        said.append(f"Content-Length: {len(body)}")
    return "\r\n".join(said).encode() + b"\r\n\r\n" + body


def completion(*right: str, **fields: Any) -> Abuse:
    """A completion of four tokens, with fields of its own."""
    body = {"prompt": "Call me", "max_tokens": 4} | fields
    return Abuse(request(TEXT, json.dumps(body).encode()), right)


def chat(*right: str, **fields: Any) -> Abuse:
    """A chat of four tokens, with fields of its own."""
    body = {"messages": [user("Why?")], "max_tokens": 4} | fields
    return Abuse(request(CHAT, json.dumps(body).encode()), right)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def raw(body: bytes, *right: str) -> Abuse:
    return Abuse(request(TEXT, body), right)


MB = 1 << 20
WORD = b'{"prompt": "Call me", "max_tokens": 4}'
DRAWN = {"temperature": 1.0}
TOOL_CALL = {"function": {"name": "f", "arguments": "{"}}
ELSEWHERE, FILE = f"http://{HOST}:9/image", "file:///etc/passwd"

# What is refused once the prompt is read has mlx-lm's 404, all else that it is asked
# for wrongly 400.
ABUSES = {
    "length missing": Abuse(f"POST {TEXT} HTTP/1.1\r\n\r\n".encode(), ("411",)),
    "length -1": Abuse(request(TEXT, WORD, "Content-Length: -1"), ("400",)),
    "length not a number": Abuse(request(TEXT, WORD, "Content-Length: x"), ("400",)),
    "length of a terabyte": Abuse(
        request(TEXT, WORD, f"Content-Length: {MB**2}"), ("413",), ends=True
    ),
    "length of 30 digits": Abuse(
        request(TEXT, WORD, f"Content-Length: {10**30}"), ("413",), ends=True
    ),
    "length above the body's": Abuse(
        request(TEXT, WORD, "Content-Length: 1000"), ("400",), ends=True
    ),
    "body of 50 MB": raw(b'{"prompt": "' + b"a" * 50 * MB + b'"}', "413"),
    "not JSON": raw(b"{prompt", "400"),
    "not UTF-8": raw(b'{"prompt": "\xff\xfe"}', "400"),
    "nested too deeply": raw(b"[" * 100_000, "400"),
    "a list": raw(b"[1]", "400"),
    "a path": Abuse(request("/v1/nothing", WORD), ("404",)),
    "a path to get": Abuse(request("/../etc/passwd", b"", method="GET"), ("404",)),
    "a method": Abuse(request(TEXT, WORD, method="BREW"), ("501",)),
    "no HTTP": Abuse(b"\x16\x03\x01\x02\x00\r\n\r\n", ("no status",)),
    "a header of 100 KB": Abuse(
        request(TEXT, WORD, "X: " + "a" * 100_000), ("431", "reset")
    ),
    "200 headers": Abuse(request(TEXT, WORD, *["X: a"] * 200), ("431", "reset")),
    "a header without a colon": Abuse(request(TEXT, WORD, "nothing"), ("411", "400")),
    "max_tokens 0": completion("400", max_tokens=0),
    "max_tokens -1": completion("400", max_tokens=-1),
    "max_tokens a text": completion("400", max_tokens="4"),
    "max_tokens 1.5": completion("400", max_tokens=1.5),
    "num_draft_tokens 0": completion("200", num_draft_tokens=0),
    "num_draft_tokens -1": completion("400", num_draft_tokens=-1),
    "num_draft_tokens a million": completion("400", num_draft_tokens=10**6),
    "temperature -1": completion("400", temperature=-1),
    "temperature NaN": completion("400", temperature=float("nan")),
    "temperature infinite": completion("400", temperature=float("inf")),
    "temperature of 400 digits": completion("400", temperature=10**400),
    "presence_penalty of 400 digits": completion("400", presence_penalty=10**400),
    "frequency_penalty a text": completion("400", frequency_penalty="x"),
    "top_k beyond the vocabulary": completion("404", top_k=10**6, **DRAWN),
    "xtc_threshold 0.9": completion(
        "404", xtc_probability=0.9, xtc_threshold=0.9, **DRAWN
    ),
    "logprobs a text": completion("400", logprobs="yes"),
    "top_logprobs 12": completion("400", top_logprobs=12),
    "top_logprobs -2": completion("400", top_logprobs=-2),
    "top_logprobs 11": completion("200", top_logprobs=11),
    "stop a number": completion("400", stop=5),
    "stop numbers": completion("400", stop=[1, 2]),
    "stop an object": completion("400", stop={"a": 1}),
    "stop null": completion("400", stop=[None]),
    "stop lists": completion("400", stop=[["a"]]),
    "stop 10,000 words": completion("400", stop=[str(i) for i in range(10_000)]),
    "stop an empty word": completion("200", stop=[""]),
    "logit_bias beyond the vocabulary": completion("404", logit_bias={"99999999": 9}),
    "logit_bias of a negative token": completion("404", logit_bias={"-99999999": 9}),
    "logit_bias of 30 digits": completion("404", logit_bias={str(10**30): 1}),
    "logit_bias null": completion("400", logit_bias={"1": None}),
    "logit_bias NaN": completion("400", logit_bias={"1": float("nan")}),
    "seed of 30 digits": completion("400", seed=10**30),
    "seed a text": completion("400", seed="x"),
    "prompt empty": completion("404", prompt=""),
    "prompt a number": completion("400", prompt=5),
    "prompt of numbers": completion("400", prompt=[1, 2]),
    "prompts": completion("400", prompt=["Call", "me"]),
    "prompt half a character": completion("404", prompt="\ud800"),
    "stop half a character": completion("404", stop="\ud800"),
    "prompt null": completion("400", prompt=None),
    "prompt an object": completion("400", prompt={"a": 1}),
    "messages missing": chat("404", messages=[]),
    "messages a text": chat("400", "404", messages="Why?"),
    "messages numbers": chat("400", messages=[5]),
    "messages without a role": chat("404", messages=[{"content": "Why?"}]),
    "content a number": chat("200", "404", messages=[user(5)]),
    "content an image elsewhere": chat("400", messages=[user([image(ELSEWHERE)])]),
    "content an image of a file": chat("400", messages=[user([image(FILE)])]),
    "content a broken image": chat("404", messages=[user([image("data:x")])]),
    "tools a number": chat("200", "404", tools=5),
    "chat_template_kwargs a number": chat("400", chat_template_kwargs=5),
    "a chat template without end": chat(
        "400",
        chat_template_kwargs={
            "chat_template": "{% for i in range(99999) %}"
            "{% for j in range(99999) %}x{% endfor %}{% endfor %}"
        },
    ),
    "chat_template_kwargs max_length": chat(
        "400", chat_template_kwargs={"padding": "max_length", "max_length": 10**9}
    ),
    "stream a text": completion("400", stream="yes"),
    "stream_options a number": completion("400", stream=True, stream_options=5),
    "stream_options empty": completion("200", stream=True, stream_options={}),
    "a tool call that is not JSON": chat(
        "404", messages=[user("Why?") | {"tool_calls": [TOOL_CALL]}]
    ),
    "an unknown model": completion("404", model="./nothing"),
    "an unknown draft model": completion("404", draft_model="./nothing"),
    "a draft model of no name": completion("400", draft_model={"a": 1}),
    # mlx-lm reads it beside the name of a model only.
    "unknown adapters": completion("200", adapters="./nothing"),
    "model with a zero byte": completion("404", model="a\0b"),
    "model a number": completion("400", model=5),
}
