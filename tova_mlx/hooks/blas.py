"""Fast float32 matrix products for MLX on Linux.

MLX's Linux wheel is linked against the reference BLAS, which is some twenty times
slower than OpenBLAS. The `scipy-openblas32` wheel carries an OpenBLAS that needs
nothing else and picks its kernels at run time, but its symbols are prefixed, so
loading it first is not enough: the calls that `libmlx.so` makes are pointed at it.

Knows nothing about models or caches. Does nothing outside Linux.
"""

import ctypes
import importlib.util
import mmap
import struct
import sys
from pathlib import Path

_ROUTINES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 2, 5, 6, 23
_PT_LOAD, _PT_DYNAMIC = 1, 2
_READ_WRITE = 3


def load_openblas() -> bool:
    """Point MLX's matrix products at OpenBLAS. Returns whether they are now.

    Call it once, at a program's entry (it imports `mlx.core`). Safe to call again.
    False where there is nothing to do (macOS) or no OpenBLAS wheel.
    """
    if not sys.platform.startswith("linux"):
        return False
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return False
    import mlx.core as mx

    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    try:
        openblas = ctypes.CDLL(str(library))
        slots = _call_slots(Path(mx.__file__).parent / "lib" / "libmlx.so")
    except (OSError, ValueError, struct.error):
        return False
    for routine in _ROUTINES:
        if routine in slots:
            target = ctypes.cast(getattr(openblas, f"scipy_{routine}"), ctypes.c_void_p)
            _write_pointer(slots[routine], target.value or 0)
    return "cblas_sgemm" in slots


def _call_slots(library: Path) -> dict[str, int]:
    """Addresses at which a loaded ELF-64 library keeps the functions it calls."""
    base = _load_address(library)
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{library} is not a little-endian 64-bit ELF file")
    (first,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [
        struct.unpack_from("<IIQQQQQQ", data, first + i * size) for i in range(count)
    ]

    def in_file(address: int) -> int:
        for kind, _, offset, start, _, length, _, _ in headers:
            if kind == _PT_LOAD and start <= address < start + length:
                return offset + address - start
        raise ValueError(f"{library}: address {address:#x} is not in the file")

    dynamic: dict[int, int] = {}
    for kind, _, offset, _, _, length, _, _ in headers:
        if kind == _PT_DYNAMIC:
            dynamic.update(struct.iter_unpack("<QQ", data[offset : offset + length]))
    if not {_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL} <= dynamic.keys():
        raise ValueError(f"{library} makes no calls through a table")
    names, symbols = in_file(dynamic[_DT_STRTAB]), in_file(dynamic[_DT_SYMTAB])
    calls = in_file(dynamic[_DT_JMPREL])
    slots = {}
    table = data[calls : calls + dynamic[_DT_PLTRELSZ]]
    for address, info, _ in struct.iter_unpack("<QQq", table):
        (name,) = struct.unpack_from("<I", data, symbols + (info >> 32) * 24)
        end = data.index(b"\0", names + name)
        slots[data[names + name : end].decode()] = base + address
    return slots


def _load_address(library: Path) -> int:
    wanted = str(library.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted and fields[2] == "00000000":
            return int(fields[0].split("-")[0], 16)
    raise ValueError(f"{library} is not loaded")


def _write_pointer(address: int, value: int) -> None:
    """Write through a page that full RELRO may have made read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.c_void_p(address // mmap.PAGESIZE * mmap.PAGESIZE)
    if libc.mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), _READ_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.c_void_p.from_address(address).value = value
