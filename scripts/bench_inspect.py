"""What inspecting costs: recording, the page's size, and how it moves in a browser.

    python scripts/bench_inspect.py [--text FILE] [--rounds 5] [--only-off] [--out FILE]

Demo model, float32 where there is no Metal. `off`: how often a decoded token asks for
an observer while there is none, what one such question takes, and the share of the
token's CPU time that all of them are. Then the same tokens with nobody looking, with an
observer of evictions, and with scores too, in turn: the medians of the ratios.
`off_again` is nobody looking once more: what is noise. Then pages of 2,000 tokens, and
of 5,000 under two policies, are opened in Chromium: until they can be used, and one
frame of a slider that jumps and of one that moves on, as it was seen and in CPU time of
the page's thread alone. The last line is JSON.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import EXCERPT, finish, load_demo_model, provenance, repeated_ids

from tova_mlx import inspect, make_prompt_cache, observe_evictions
from tova_mlx.evaluation.reading import read
from tova_mlx.inspection.record import Inspection
from tova_mlx.storage.observer import Observer

POLICIES = ("tova", "h2o", "streaming")
SIZE, LENGTH, STEP = 128, 512, 256
# A frame of the slider at these shares of the text, in turn.
JUMPS = [(37 * i % 60) / 60 for i in range(60)]
STEPS = [0.5 + 0.001 * i for i in range(60)]
FRAME = """async (shares) => {
  const slider = document.getElementById("time"), found = [];
  for (const share of shares) {
    slider.value = Math.round(share * slider.max);
    const begun = performance.now();
    slider.dispatchEvent(new Event("input"));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    found.push(performance.now() - begun);
  }
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=EXCERPT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-off", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    ids = repeated_ids(tokenizer, args.text, 5000)
    result: dict[str, Any] = {**provenance(), "max_kv_size": SIZE, "step": STEP}
    result["off"] = _off(model, ids[: SIZE + 1])
    print("off", result["off"], flush=True)
    if args.only_off:
        finish(result, args.out)
        return
    result["recording"] = {
        policy: _recording(model, tokenizer, ids[:LENGTH], policy, args.rounds)
        for policy in POLICIES
    }
    pages = {
        "2000_tokens": (ids[:2000], ("tova",)),
        "2000_tokens_two_policies": (ids[:2000], ("tova", "h2o")),
        "5000_tokens_two_policies": (ids, ("tova", "streaming")),
    }
    result["pages"] = {}
    for name, (some, policies) in pages.items():
        begun = time.perf_counter()
        found = inspect(model, tokenizer, some, 256, policy=policies)
        row = {"policies": policies, "seconds_to_record": time.perf_counter() - begun}
        result["pages"][name] = row | _page(found)
        print(name, result["pages"][name], flush=True)
    finish(result, args.out)


class _Counting(Observer):
    """Nobody, who counts how often he is asked for."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        _Counting.asked += 1
        return super().__getattribute__(name)

    def __bool__(self) -> bool:
        _Counting.asked += 1
        return False


def _off(model: Any, ids: list[int], n: int = 64) -> dict[str, Any]:
    """What a decoded token of `tova` spends on an observer that is not there."""
    caches = make_prompt_cache(model, SIZE, journal=0)
    list(read(model, mx.array([ids]), caches, STEP))

    def decode() -> float:
        begun = time.process_time()
        for token in ids[:n]:
            mx.eval(model(mx.array([[token]]), cache=caches))
        return (time.process_time() - begun) / n

    decode()
    token = statistics.median(decode() for _ in range(5))
    nobody = Observer()
    times = timeit.repeat(lambda: bool(nobody), number=10**5, repeat=7)
    for cache in caches:
        cache.slots.observer = _Counting()
    decode()
    asked, question = _Counting.asked / n, min(times) / 10**5
    return {
        "asked_per_token": asked,
        "seconds_per_question": question,
        "cpu_seconds_per_token": token,
        "share": asked * question / token,
    }


def _recording(
    model: Any, tokenizer: Any, ids: list[int], policy: str, rounds: int
) -> dict[str, Any]:
    """Seconds of each way to read, and the median ratios to nobody looking."""

    def plain(watch: Callable[[list[Any]], Any] | None = None) -> None:
        caches = make_prompt_cache(model, SIZE, policy=policy, journal=0)
        with ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watch(caches))
            for _ in read(model, mx.array([ids]), caches, STEP):
                pass

    ways: dict[str, Callable[[], Any]] = {
        "off": plain,
        "off_again": plain,
        "evictions": lambda: plain(lambda c: observe_evictions(c, lambda *_: None)),
        "inspect": lambda: inspect(model, tokenizer, ids, SIZE, policy=policy),
    }
    plain()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        # Now one is first, now the other.
        for name in list(ways)[:: 1 if i % 2 else -1]:
            begun = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - begun)
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(seconds[name], seconds["off"], strict=True)
        )
        for name in ways
    }
    row = {"tokens": len(ids), "cpu_seconds": seconds, "ratio_to_off": ratios}
    print(policy, {k: round(v, 3) for k, v in ratios.items()}, flush=True)
    return row


def _page(found: Inspection) -> dict[str, Any]:
    """Bytes of a page, and milliseconds in Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        path = found.save(Path(place) / "page.html")
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        ready, ready_cpu = [], []
        for _ in range(7):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            ready.append(page.evaluate("+document.documentElement.dataset.ready"))
            ready_cpu.append(1000 * _cpu_seconds(session))
        row: dict[str, Any] = {
            "bytes": path.stat().st_size,
            "ready_ms": sorted(ready),
            "ready_cpu_ms": sorted(ready_cpu),
            "load_average": os.getloadavg()[0],
            "browser": browser.version,
        }
        for name, shares in (("jump", JUMPS), ("move", STEPS)):
            page.evaluate(FRAME, shares)
            before = _cpu_seconds(session)
            seen = sorted(page.evaluate(FRAME, shares))
            row[name] = {
                "frame_ms_median": statistics.median(seen),
                "frame_ms_p90": seen[int(0.9 * len(seen))],
                "cpu_ms_per_frame": 1000
                * (_cpu_seconds(session) - before)
                / len(shares),
            }
        browser.close()
    return row


def _cpu_seconds(session: Any) -> float:
    """CPU time of the page's main thread so far."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(m["value"] for m in metrics if m["name"] == "TaskDuration")


if __name__ == "__main__":
    main()
