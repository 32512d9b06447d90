"""Streams, signals and surroundings that are not as usual, for every command.

Each is a way to run a command, and how it may end: with which exit code, and whether a
line says what is wrong. Never with a traceback.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fault_writers import WRITERS, Undisturbed, alike, lost, torn
from faults import Done, Place, default_interrupt

_EVAL = "--model {model} --policy tova --max-kv-size 48 --out {work}/out"
COMMANDS = {
    "generate": "-m tova_mlx generate Ça_va,_世界? --model {model} --max-tokens 4",
    "generate --json": "-m tova_mlx generate - --model {model} --max-tokens 4 --json",
    "chat": "-m tova_mlx chat --model {model} --max-tokens 4",
    "info": "-m tova_mlx info --model {model}",
    "run generate": "-m tova_mlx run generate --model {model} --prompt Tell_me "
    "--max-tokens 4",
    "run chat": "-m tova_mlx run chat --model {model} --max-tokens 4",
    "inspect --json": "-m tova_mlx inspect {novel} --model {model} --tokens 90 "
    "--max-kv-size 48 --json",
    "eval perplexity": f"-m tova_mlx eval perplexity {{novel}} {_EVAL} --context 100 "
    "--tokens 100",
    "bench": f"-m tova_mlx bench {_EVAL} --context 60 --steps 5 --bandwidth 10",
    "--help": "-m tova_mlx --help",
}
# What is said to each of them: questions to a chat, a prompt to `-`.
SAID = "Some words\n"


@dataclass(frozen=True)
class Ending:
    """A way to run commands.

    codes: exit codes that are right; errors: how many lines may name an error; shell,
    environment: as for `Place.run`; said: stdin; needs_root: mounts, or another user.
    """

    name: str
    codes: tuple[int, ...]
    errors: tuple[int, ...] = (0,)
    shell: str = 'exec "$@"'
    environment: dict[str, str | None] = field(default_factory=dict)
    said: str = SAID
    needs_root: bool = False
    commands: tuple[str, ...] = tuple(COMMANDS)


_ASCII = {"LC_ALL": "C", "LANG": None, "PYTHONIOENCODING": None}
# Python takes C for UTF-8 unless it is told not to.
_ONLY_ASCII = {**_ASCII, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_FOREIGN = "Ça va, 世界?\n"
_NOBODY = "unshare -U --map-user=54321 --map-group=54321"
_NOT_HELP = tuple(name for name in COMMANDS if name != "--help")
_FEW = ("generate", "chat", "info", "run generate", "eval perplexity")
_NO_TEMPORARY = (
    "for d in /tmp /var/tmp /usr/tmp /dev/shm; do [ -d $d ] && mount --bind $d $d && "
    "mount -o remount,bind,ro $d; done; w=$0; mount --bind $w $w && "
    'mount -o remount,bind,rw $w; cd /proc; exec "$@"'
)
ENDINGS = [
    # bench and the evaluations print at their end, on what is then closed.
    Ending("stdout full", (1,), (1,), 'exec "$@" >/dev/full'),
    Ending("stdout closed", (0,), shell='exec "$@" >&-'),
    Ending(
        "stdout a pipe nobody reads",
        # Quiet, as click has it, and every tool of Unix.
        (1,),
        shell='"$@" | (exec <&-; sleep 0.1); exit ${PIPESTATUS[0]}',
    ),
    Ending("stderr closed", (0,), shell='exec "$@" 2>&-'),
    Ending("stderr full", (0, 1), shell='exec "$@" 2>/dev/full'),
    Ending("stdin closed", (0, 1), (0, 1), 'exec "$@" <&-'),
    Ending("all streams closed", (0, 1), shell='exec "$@" <&- >&- 2>&-'),
    Ending("SIGPIPE as the system has it", (0,), shell='trap - PIPE; exec "$@"'),
    Ending(
        "HOME is not there",
        (0,),
        environment={"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": None},
        commands=_NOT_HELP,
    ),
    Ending(
        "nothing but the model can be written, no matplotlib directory",
        (0,),
        environment={
            "HOME": "/proc",
            "XDG_CACHE_HOME": "/proc/none",
            "XDG_CONFIG_HOME": "/proc/none",
            "MPLCONFIGDIR": None,
        },
        commands=_FEW,
    ),
    Ending(
        "a user without a home",
        (0,),
        shell=f'exec {_NOBODY} env -u HOME -u XDG_CACHE_HOME "$@"',
        needs_root=True,
        commands=("generate", "chat", "info", "run generate"),
    ),
    Ending(
        "no directory for temporary files",
        (0, 1),
        (0, 1),
        f"exec unshare -m bash -c '{_NO_TEMPORARY}' {{work}} \"$@\"",
        needs_root=True,
        commands=(*_FEW, "bench"),
    ),
    Ending("a locale of ASCII", (0,), environment=_ASCII, said=_FOREIGN),
    Ending(
        "a locale of ASCII alone",
        # MLX cannot write to the names that Python has for files then.
        (0,),
        environment=_ONLY_ASCII,
        said=_FOREIGN,
        commands=tuple(name for name in COMMANDS if name != "bench"),
    ),
    Ending(
        "streams of ASCII",
        (0,),
        environment={"PYTHONIOENCODING": "ascii"},
        said=_FOREIGN,
    ),
    Ending("stdin is no text", (0, 1), (0, 1), 'printf "\\377\\376\\n" | "$@"'),
]


def wrong_in(ending: Ending, done: Done) -> list[str]:
    """What is wrong with how a command ended."""
    if done.has_traceback:
        return [f"a traceback: {done.last}"]
    if done.code not in ending.codes:
        return [f"exit {done.code}: {done.last}"]
    if len(done.errors) not in ending.errors:
        return [f"{len(done.errors)} lines name an error: {done.last}"]
    return []


def end(place: Place, ending: Ending, command: str) -> list[str]:
    """Run a command in a way; what is wrong with its end."""
    place.clear()
    place.work.chmod(0o777)
    done = place.run(
        COMMANDS[command], ending.said, shell=ending.shell, **ending.environment
    )
    return wrong_in(ending, done)


# Places that cannot be written


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.geteuid() == 0 and sys.platform.startswith("linux")


@contextmanager
def mounted(place: Place, nbytes: int, files: dict[str, bytes]) -> Iterator[None]:
    """Have `work` be a file system of its own, with room for so many bytes."""
    place.clear()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(place.work)],
        check=True,
    )
    try:
        place.put(files)
        yield
    finally:
        subprocess.run(["umount", "-l", str(place.work)], check=True)


def fill_disk(place: Place, name: str, calm: Undisturbed, pages: int) -> list[str]:
    """Run a writer on a real disk that has room for a few pages; what is wrong."""
    writer = next(w for w in WRITERS if w.name == name)
    # Blocks are pages, and a directory takes none.
    taken = sum(-(-len(data) // 4096) for data in calm.before.values())
    with mounted(place, 4096 * (taken + pages), calm.before):
        done = place.run(writer.words, writer.stdin)
        return _survived(calm, done, place.files(), (0, 1), (0, 1, 2, 3))


def read_only(place: Place, name: str, calm: Undisturbed) -> list[str]:
    """Run a writer on a disk that cannot be written; what is wrong."""
    writer = next(w for w in WRITERS if w.name == name)
    with mounted(place, 1 << 26, calm.before):
        remount = ["mount", "-o", "remount,ro", str(place.work)]
        subprocess.run(remount, check=True)
        done = place.run(writer.words, writer.stdin)
        there = place.files()
    codes, errors = ((0, 1), (1, 2, 3)) if writer.goes_on else ((1, 2), (1,))
    problems = _survived(calm, done, there, codes, errors)
    return problems + ([] if there == calm.before else ["files are not as before"])


def by_nobody(place: Place, name: str, calm: Undisturbed) -> list[str]:
    """Run a writer as a user who may not write there; what is wrong."""
    writer = next(w for w in WRITERS if w.name == name)
    place.restore(calm.before)
    shell = f'chmod -R a-w {{work}}; exec {_NOBODY} "$@"'
    try:
        done = place.run(writer.words, writer.stdin, shell=shell)
        there = place.files()
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place.work)], check=True)
    codes, errors = ((0, 1), (1, 2, 3)) if writer.goes_on else ((1, 2), (1,))
    problems = _survived(calm, done, there, codes, errors)
    return problems + ([] if there == calm.before else ["files are not as before"])


def _survived(
    calm: Undisturbed,
    done: Done,
    there: dict[str, bytes],
    codes: tuple[int, ...],
    errors: tuple[int, ...],
) -> list[str]:
    problems = wrong_in(Ending("", codes, errors), done)
    if done.code == 0 and not done.errors:
        same = alike(there, calm.after)
        problems += [] if same else ["exit 0, but not all is there"]
    problems += [f"{name} is torn" for name in torn(there)]
    return problems + [f"{name} is lost" for name in lost(calm.before, there)]


# Signals


def send(
    place: Place,
    words: str,
    number: int,
    wait: Callable[[subprocess.Popen[bytes]], None],
    stdin: str = SAID,
) -> Done:
    """Start a command, wait, and send it a signal; how it ended."""
    with subprocess.Popen(
        [sys.executable, *place.fill(words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=place.environment(),
        cwd=place.root,
        preexec_fn=default_interrupt,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(stdin.encode())
        process.stdin.flush()
        wait(process)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            return Done(-1, "", "it did not end within two minutes")
    return Done(process.returncode, out.decode(errors="replace"), err.decode())


def after(seconds: float) -> Callable[[subprocess.Popen[bytes]], None]:
    """Wait for so long."""
    return lambda process: time.sleep(seconds)


def after_line(text: bytes) -> Callable[[subprocess.Popen[bytes]], None]:
    """Wait for a line on stderr that has a text."""

    def wait(process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        while (line := process.stderr.readline()) and text not in line:
            pass

    return wait


def wrong_after_interrupt(done: Done) -> list[str]:
    """What is wrong with how a command ended after Ctrl-C, at whatever time."""
    if done.has_traceback:
        return [f"a traceback: {done.last}"]
    # It may have been done before. And CPython ends by the signal itself, 130 for a
    # shell, as it begins and as it winds down, and where the signal came while it ran
    # a text, as it does to make a dataclass.
    if done.code in (130, 0, -SIGINT):
        return []
    return [f"exit {done.code} after Ctrl-C: {done.last}"]


SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
