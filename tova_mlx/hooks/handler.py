"""What mlx-lm's server reads from its clients, within limits, and when they leave."""

import inspect
import io
import json
import logging
import math
import socket
import sys
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm import server
from transformers import PreTrainedTokenizerBase

# Two million tokens of text, which are split in seconds, or a photograph.
MOST_BYTES = 8 << 20
# Of all stop words: mlx-lm keeps what it makes of them for a hundred requests.
MOST_STOP_CHARACTERS = 4096
# Until the next bytes of a request come, or those of an answer are taken.
SECONDS = 60.0

_NUMBERS = (
    *("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
# What a request may not say of a template's use: a template of its own may never end.
_USE = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_TEMPLATE_USE = set(_USE) - {"documents", "kwargs"}


class Listener(ThreadingHTTPServer):
    """Takes many clients that come at the same moment; Python's own turns some away."""

    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection in one line."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logging.info(f"{client_address[0]} has left: {error}")
        else:
            logging.error(
                f"{client_address[0]}: {type(error).__name__}: {error}",
                exc_info=logging.getLogger().isEnabledFor(logging.DEBUG),
            )


class _Attended:
    """mlx-lm's generator of answers for one client, which stops once it has left.

    check: raises OSError then. mlx-lm itself notices only when it writes, which it does
    at the end of an answer that is not streamed.
    """

    def __init__(self, generator: Any, check: Callable[[], None]):
        self._generator = generator
        self._check = check
        self._context: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, request: Any, args: Any, progress_callback: Any = None) -> Any:
        def progress(*counts: int) -> None:
            self._check()
            if progress_callback is not None:
                progress_callback(*counts)

        def attended() -> Any:
            for response in responses:
                self._check()
                yield response

        self._context, responses = self._generator.generate(request, args, progress)
        return self._context, attended()

    def stop(self) -> None:
        """Stop what is generated; mlx-lm does not if it cannot send a first line."""
        if self._context is not None:
            self._context.stop()


def request_handler(max_draft_tokens: int | None) -> type[server.APIHandler]:
    """Return mlx-lm's handler of requests, which refuses what would harm others.

    max_draft_tokens: more than can be taken back are an error.
    """

    class Handler(server.APIHandler):
        timeout = SECONDS

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            try:
                said = int(length)
            except ValueError:
                # mlx-lm says it.
                return super().do_POST()
            if said > MOST_BYTES:
                self._refuse(413, f"a body of more than {MOST_BYTES} bytes")
                return self._drop(said)
            body = self.rfile.read(said) if said >= 0 else b""
            if len(body) != said:
                return self._refuse(400, "the body is not as long as it is said to be")
            try:
                json.loads(body)
            except (ValueError, RecursionError) as error:
                return self._refuse(400, f"Invalid JSON in request body: {error}")
            connection, self.rfile = self.rfile, io.BytesIO(body)
            try:
                return super().do_POST()
            finally:
                self.rfile = connection

        def _refuse(self, status: int, reason: str) -> None:
            self._set_completion_headers(status)
            self.end_headers()
            self.wfile.write(json.dumps({"error": reason}).encode())

        def _drop(self, length: int) -> None:
            """Read some of what nobody wants, or the client may not see why."""
            left = min(length, 8 * MOST_BYTES)
            while left and (some := self.rfile.read1(min(left, 1 << 16))):
                left -= len(some)

        def validate_model_parameters(self) -> None:
            """Raises ValueError; mlx-lm answers with its text."""
            try:
                super().validate_model_parameters()
                bias = (self.logit_bias or {}).values()
                numbers = [*(getattr(self, name) for name in _NUMBERS), *bias]
                if not all(map(math.isfinite, numbers)):
                    raise ValueError("numbers must be finite")
            except (TypeError, OverflowError) as error:
                raise ValueError(f"a number cannot be read: {error}") from error
            self._validate("num_draft_tokens", int, max_val=max_draft_tokens)
            self._validate("requested_draft_model", str, optional=True)
            self._validate("seed", int, 0, (1 << 64) - 1, optional=True)
            self._validate("stream_options", dict, optional=True)
            if self.stream_options is not None:
                # mlx-lm reads it once the answer is sent.
                self.stream_options.setdefault("include_usage", False)
            self._validate("chat_template_kwargs", dict, optional=True)
            for name in _TEMPLATE_USE & set(self.chat_template_kwargs or ()):
                raise ValueError(f"chat_template_kwargs cannot have {name}")
            if not isinstance(self.body.get("prompt", ""), str):
                raise ValueError("prompt must be a text")
            stop = self.body.get("stop") or []
            words = stop if isinstance(stop, list) else [stop]
            if not all(isinstance(word, str) for word in words):
                raise ValueError("stop must be a text or a list of texts")
            if sum(map(len, words)) > MOST_STOP_CHARACTERS:
                raise ValueError(
                    f"stop must have at most {MOST_STOP_CHARACTERS} characters"
                )

        def handle_chat_completions(self) -> server.CompletionRequest:
            """Raises ValueError; mlx-lm answers with its text."""
            for part in server._image_parts(self.body.get("messages", ())):
                # mlx-lm would fetch any other, whatever its size, for any model.
                if not str(server._image_url(part)).startswith("data:"):
                    raise ValueError("an image must be a data URL")
            return super().handle_chat_completions()

        def handle_completion(self, request: Any, stop_words: list[str]) -> None:
            attended: Any = _Attended(self.response_generator, self._check_client)
            self.response_generator = attended
            try:
                super().handle_completion(request, stop_words)
            except OSError:
                # The client has left.
                raise
            except Exception as error:
                self._fail(str(error))
            finally:
                attended.stop()

        def _check_client(self) -> None:
            """Raise ConnectionAbortedError if the client will send nothing more."""
            self.connection.settimeout(0)
            try:
                left = not self.connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                left = False
            finally:
                self.connection.settimeout(self.timeout)
            if left:
                raise ConnectionAbortedError("its connection is closed")

        def _fail(self, reason: str) -> None:
            """Say that an answer that was begun will not be finished."""
            if self.stream:
                # As clients of OpenAI's look for it.
                error = json.dumps({"error": {"message": reason}})
                self.wfile.write(f"data: {error}\n\n".encode())
            else:
                # mlx-lm has put down that all is well, and not sent it.
                this: Any = self
                this._headers_buffer.clear()
                self._refuse(500, reason)

    return Handler
