"""Link-time stand-ins for an older glibc and libstdc++, so that a library linked here loads there.

    python wheels/old_libc.py FOLDER   # then link with -LFOLDER

A linker binds each symbol to the newest version that the library in front of it has: a library
linked on this machine would need this machine's glibc. The stand-ins have this machine's symbols
without those newer than manylinux_2_28 allows, and no code. What newer headers refer to besides is
taken from libstdc++.a, as the compilers for manylinux_2_28 do it; what is neither there nor in the
stand-ins is an error of the linker (-z defs).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# The limits of manylinux_2_28.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
LIBRARIES = {
    "c": "libc.so.6",
    "m": "libm.so.6",
    "ld": "ld-linux-x86-64.so.2",
    "stdc++": "libstdc++.so.6",
}
# What glibc 2.28 has in libraries of its own, by name; libc.so.6 has it since 2.34.
APART = {
    "libdl.so.2": r"dl[a-z0-9]+",
    "libpthread.so.0": r"(pthread|sem)_\w+",
    "librt.so.1": r"(aio|lio|mq|shm|timer)_\w+",
}
COMPILER = os.environ.get("CXX", "g++")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def located(name: str) -> str:
    """The file that the compiler links for this name."""
    return os.path.realpath(output(COMPILER, f"-print-file-name={name}").strip())


def numbers(version: str) -> tuple[str, tuple[int, ...]] | None:
    """GLIBC_2.2.5 -> ("GLIBC", (2, 2, 5)); None for versions without numbers (GLIBC_PRIVATE)."""
    name, _, rest = version.partition("_")
    if re.fullmatch(r"[\d.]+", rest) is None:
        return None
    return name, tuple(map(int, rest.split(".")))


def symbols(library: str) -> dict[str, tuple[str, str, int]]:
    """name -> (version, type, size) of the newest version of each symbol within the limits."""
    found: dict[str, tuple[tuple[int, ...], tuple[str, str, int]]] = {}
    for line in output("readelf", "--dyn-syms", "--wide", library).splitlines():
        words = line.split()
        if len(words) != 8 or words[3] not in ("FUNC", "OBJECT", "IFUNC") or words[6] == "UND":
            continue
        name, _, version = words[7].replace("@@", "@").partition("@")
        parsed = numbers(version)
        if parsed is None or parsed[0] not in NEWEST or parsed[1] > NEWEST[parsed[0]]:
            continue
        if name not in found or parsed[1] > found[name][0]:
            kind = "object" if words[3] == "OBJECT" else "function"
            found[name] = parsed[1], (version, kind, int(words[2], 0))
    return {name: row for name, (_, row) in found.items()}


def write_stand_in(folder: Path, soname: str, rows: dict[str, tuple[str, str, int]]) -> Path:
    """A shared library of this name with these symbols."""
    source, script, library = (folder / f"{soname}{end}" for end in (".s", ".map", ""))
    source.write_text(
        "".join(
            f".globl {name}\n.type {name},@{kind}\n.size {name},{size}\n{name}:\n"
            for name, (_, kind, size) in rows.items()
        )
    )
    by_version: dict[str, list[str]] = {}
    for name, (version, _, _) in rows.items():
        by_version.setdefault(version, []).append(name)
    script.write_text(
        "".join(
            f"{version} {{ global: {' '.join(f'{n};' for n in names)} }};\n"
            for version, names in by_version.items()
        )
    )
    subprocess.run(
        [COMPILER, "-shared", "-nostdlib", f"-Wl,-soname,{soname}",
         f"-Wl,--version-script,{script}", str(source), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, soname in LIBRARIES.items():
        rows = symbols(located(soname))
        for apart, pattern in APART.items() if name == "c" else ():
            own = [symbol for symbol in rows if re.fullmatch(pattern, symbol)]
            files[apart] = write_stand_in(folder, apart, {s: rows.pop(s) for s in own})
        files[name] = write_stand_in(folder, soname, rows)
    # What the compiler links by -lc and -lstdc++ are scripts of the linker.
    groups = {
        # With what every library has a copy of, such as atexit, which CUDA code calls when loaded.
        "c": [*(files[name] for name in ("c", *APART, "ld")), located("libc_nonshared.a")],
        "m": [files["m"]],
        "stdc++": [files["stdc++"], located("libstdc++.a")],
    }
    for name, members in groups.items():
        (folder / f"lib{name}.so").write_text(f"INPUT ( {' '.join(map(str, members))} )\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
