"""The C interface from C: its header is C99, a program without Python gets the same bits, and goes on doing so when
the library grows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from safepatch_core.backends.contract import Bits, Block, PatchData
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.spec import COMBINE
from safepatch_core.version import __version__
from tests.c_library import HEADER, LIB, PARTS, constant, fields

CSRC = Path(__file__).parents[1] / "csrc"
CC, CXX = shutil.which("gcc"), shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(CC is None or CXX is None, reason="needs gcc and g++"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources"),
]

PROGRAM = r"""
#include <safepatch.h>

#include <stdio.h>
#include <string.h>

#define N 5000

static void refuse(sp_status status, sp_status expected) {
    printf("%s: %s\n", status == expected ? "refused" : "WRONG", sp_last_error());
}

int main(void) {
    static float base[N], values[N], out[N];
    int i, p;
    for (i = 0; i < N; ++i) {
        base[i] = (float)(i % 17) - 8.0f;
        values[i] = base[i] + (float)(i * 7 % 31 - 15) / 16.0f;
    }

    sp_engine *engine = NULL;
    printf("%s %d %d\n", sp_engine_isa(NULL), (int)sp_engine_threads(NULL), (int)sp_scratch(NULL, N, 3));
    refuse(sp_engine_open(0, NULL, &engine), SP_BAD_ARGUMENT);
    refuse(sp_engine_open(1, "sse9", &engine), SP_BAD_ARGUMENT);
    if (engine != NULL || sp_engine_open(2, NULL, &engine) != SP_OK) return 1;
    printf("version %s %d %d, %d threads, %s\n", sp_version_string(), (int)(sp_abi_version() - SP_ABI_VERSION),
           (int)(sp_spec_version() - SP_SPEC_VERSION), (int)sp_engine_threads(engine),
           sp_isa_usable(sp_engine_isa(engine)) && !sp_isa_usable("sse9") ? "usable" : "WRONG");

    sp_patch patches[3];
    memset(patches, 0, sizeof patches);
    patches[0].size = sizeof patches[0];
    for (p = 0; p < 2; ++p) {
        patches[p].present = 1;
        patches[p].kind = p == 0 ? SP_CHECKPOINT : SP_DELTA;
        patches[p].importance = SP_MAGNITUDE;
        patches[p].values.data = values;
        patches[p].values.dtype = SP_F32;
        patches[p].random_key = 42u + (unsigned)p;
        patches[p].keep = p == 0 ? UINT64_C(1) << 31 : SP_KEEP_ALL;
        patches[p].scale = 0.5f;
    }
    sp_block block;
    memset(&block, 0, sizeof block);
    block.size = sizeof block;
    block.base.data = base;
    block.base.dtype = SP_F32;
    block.entries = N;
    block.start = 3;
    block.patches = patches;
    block.patch_count = 3;
    block.acts = SP_ALONE;
    block.join = SP_SUM;
    block.order = SP_RETAIN_FIRST;

    const int64_t quotas[3] = {300, 400, 500};
    sp_cut cuts[3];
    struct {
        sp_patch_report found[3];
        uint64_t guard;
    } reports;
    sp_patch_report *found = reports.found;
    sp_report report = {.size = sizeof report, .patches = found};
    sp_report counted = {.size = sizeof counted, .patches = found};
    memset(&reports, 0, sizeof reports);
    memset(cuts, 0, sizeof cuts);
    cuts[0].size = sizeof cuts[0];
    found[0].size = sizeof found[0];
    reports.guard = 0x5afe;
    if (sp_merge(engine, &block, quotas, out, cuts, &report) != SP_OK) return 1;
    for (p = 0; p < 3; ++p) {
        printf("%u %lld %lld %lld %lld\n", (unsigned)cuts[p].key, (long long)cuts[p].before,
               (long long)found[p].eligible, (long long)found[p].selected, (long long)found[p].applied);
    }
    uint32_t keys[3] = {0, 0, 0};
    int64_t ties[3], counts[8] = {0};
    sp_window window = {sizeof window, 1, 0, 28, 8, counts};
    keys[0] = cuts[0].key;
    if (sp_count_equal(engine, &block, keys, ties) != SP_OK) return 1;
    if (sp_histogram(engine, &block, &window, 1, &counted) != SP_OK || counted.acted != 0) return 1;
    printf("%lld %lld\n", (long long)ties[0], (long long)(counts[3] + counts[4]));
    for (i = 0; i < N; ++i) {
        uint32_t bits;
        memcpy(&bits, &out[i], 4);
        printf("%08x", (unsigned)bits);
    }
    printf("\n%lld %lld\n", (long long)report.acted, (long long)report.changed);
    if (sp_apply(engine, &block, cuts, base, &report) != SP_OK || memcmp(base, out, sizeof out) != 0) return 1;

    refuse(sp_merge(engine, &block, NULL, out, cuts, &report), SP_BAD_ARGUMENT);
    refuse(sp_count_equal(NULL, &block, keys, ties), SP_BAD_ARGUMENT);
    window.patch = 3;
    refuse(sp_histogram(engine, &block, &window, 1, &report), SP_BAD_ARGUMENT);
    block.acts = 4;
    refuse(sp_apply(engine, &block, cuts, out, &report), SP_BAD_ARGUMENT);
    block.acts = SP_ELECTED;
    block.join = -1;
    refuse(sp_apply(engine, &block, cuts, out, &report), SP_BAD_ARGUMENT);
    block.join = SP_MEAN;
    patches[1].kind = 9;
    refuse(sp_apply(engine, &block, cuts, out, &report), SP_BAD_ARGUMENT);
    block.entries = -1;
    refuse(sp_apply(engine, &block, cuts, out, &report), SP_BAD_ARGUMENT);
    printf("%s\n", sp_strerror(reports.guard == 0x5afe ? SP_NO_MEMORY : SP_INTERNAL));
    sp_engine_close(engine);
    sp_engine_close(NULL);
    return 0;
}
"""


# The second helper thread of an engine can't be started.
FULL = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <safepatch.h>
#include <stdio.h>

static int calls, limit = 1;

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg) {
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return ++calls > limit ? EAGAIN : real(thread, attr, start, arg);
}

int main(void) {
    sp_engine *engine = NULL;
    sp_status status = sp_engine_open(3, NULL, &engine);
    printf("%d %d %s: %s\n", calls, engine == NULL, sp_strerror(status), sp_last_error());
    limit = 9;
    if (sp_engine_open(3, NULL, &engine) != SP_OK) return 1;
    sp_engine_close(engine);
    return status == SP_NO_MEMORY ? 0 : 1;
}
"""


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(text: str, folder: Path, include: Path, *flags: str) -> Path:
    """A C program, linked to the library of the package."""
    source = folder / "program.c"
    source.write_text(text)
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wstrict-prototypes", "-Werror"]
    libs = [f"-L{LIB}", "-lsafepatch", "-pthread", *flags]
    run(CC, *strict, "-I", include, source, *libs, "-o", folder / "program")
    return folder / "program"


def lines(program: Path, library: Path = LIB) -> list[str]:
    """What it prints with a library."""
    return run(program, env={**os.environ, "LD_LIBRARY_PATH": str(library)}).splitlines()


def lines_of(text: str, folder: Path, *flags: str) -> list[str]:
    return lines(build(text, folder, CSRC / "include", *flags))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return lines_of(PROGRAM, tmp_path_factory.mktemp("c"))


def test_the_header_is_c99_and_cxx_and_stands_alone(tmp_path: Path) -> None:
    for name, command in [("a.c", [CC, "-std=c99"]), ("a.cpp", [CXX, "-std=c++20"])]:
        source = tmp_path / name
        source.write_text("#include <safepatch.h>\nint main(void) { return SP_OK; }\n")
        run(*command, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I", CSRC / "include", source)


def test_a_c_program_gets_the_reference_bits(program: list[str]) -> None:
    i = np.arange(5000)
    base = (i % 17 - 8).astype(np.float32)
    values = base + (i * 7 % 31 - 15).astype(np.float32) / np.float32(16)
    bits = Bits(values.view(np.uint32), "F32")
    patches = (
        PatchData("checkpoint", bits, "magnitude", None, "patched", 42, 1 << 31, 0.5),
        PatchData("delta", bits, "magnitude", None, "patched", 43, 1 << 32, 0.5),
        None,
    )
    block = Block(Bits(base.view(np.uint32), "F32"), 3, 1, patches, COMBINE["difference"], "retain-first")
    out = np.empty(5000, np.uint32)
    reference = ReferenceBackend()
    cuts, report = reference.merge(block, [300, 400, 500], out)
    expected = [
        f"{c.key} {c.before} {p.eligible} {p.selected} {p.applied}" for c, p in zip(cuts, report.patches, strict=True)
    ]
    assert program[4:7] == expected
    ties = reference.count_equal(block, [cuts[0].key, 0, 0])[0]
    assert program[7] == f"{ties} {report.patches[1].eligible}"
    assert program[8] == "".join(f"{word:08x}" for word in out)
    assert program[9] == f"{report.acted} {report.changed}" and 0 < report.changed <= report.acted


def test_a_c_program_is_told_what_is_wrong(program: list[str]) -> None:
    assert program[:4] == [
        "none 0 0",
        "refused: threads: expected at least 1",
        "refused: instruction set: found 'sse9', expected avx512, avx2, neon or scalar",
        f"version {__version__} 0 0, 2 threads, usable",
    ]
    assert program[10:] == [
        "refused: null array",
        "refused: null engine",
        "refused: window patch",
        "refused: block acts",
        "refused: block join",
        "refused: patch kind",
        "refused: block range",
        "out of memory",
    ]


def test_an_engine_that_lacks_threads_says_so_and_leaves_none(tmp_path: Path) -> None:
    """One helper was started: it ends with the failed call, and the next engine opens as if nothing had been."""
    found = lines_of(FULL, tmp_path, "-ldl")
    assert found == ["2 1 out of memory: no thread can be started"]


# The layout that programs were compiled with.
TABLE = Path(__file__).with_name("abi.txt")


def table(folder: Path) -> list[str]:
    """Sizes and offsets by the compiler; declarations and numbers as the header has them."""
    text = "#include <safepatch.h>\n#include <stdio.h>\nint main(void) {\n"
    for struct, of in fields().items():
        text += f'printf("%s %d\\n", "{struct}", (int)sizeof({struct}));\n'
        for field, kind in of:
            place = f"(int)offsetof({struct}, {field}), (int)sizeof((({struct} *)0)->{field})"
            text += f'printf("%s %d %d\\n", "{struct}.{field} ({kind})", {place});\n'
    plain = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
    calls = [" ".join(call.split()) for call in re.findall(r"^SP_API ([^;]+);", plain, re.M | re.S)]
    numbers = re.findall(r"\b(SP_\w+) = (\d+)", plain)
    found = lines_of(text + "return 0;\n}\n", folder)
    return [f"ABI {constant('SP_ABI_VERSION')}", *found, *calls, *(f"{name} {number}" for name, number in numbers)]


def test_the_layout_is_what_programs_were_compiled_with(tmp_path: Path) -> None:
    found, known = table(tmp_path), TABLE.read_text().splitlines()
    new = tmp_path / "abi.txt"
    new.write_text("\n".join(found) + "\n")
    gone = [line for line in known if line not in found and not re.fullmatch(r"sp_\w+ \d+", line)]
    sizes = {name: int(size) for name, size in re.findall(r"^(sp_\w+) (\d+)$", TABLE.read_text(), re.M)}
    for struct, field, offset in re.findall(r"^(sp_\w+)\.(.*) (\d+) \d+$", "\n".join(set(found) - set(known)), re.M):
        if struct in sizes and int(offset) < sizes[struct]:
            gone.append(f"{struct}.{field} lies in what older programs leave undefined")
    if found[0] == known[0]:
        assert not gone, f"an older program would break: raise SP_ABI_VERSION ({gone})"
    assert found == known, f"added to the interface: {new} becomes tests/abi.txt"


def test_every_struct_that_a_caller_allocates_begins_with_its_size() -> None:
    for name, of in fields().items():
        assert (of[0] == ("size", "size_t")) == (name not in PARTS), name


def grown(header: str) -> str:
    """The header of a later version: a field more at the end of every struct that has a size."""

    def more(found: re.Match[str]) -> str:
        return found[1] if found[2] not in fields() or found[2] in PARTS else f"    int64_t later[3];\n{found[1]}"

    return re.sub(r"^(\} (sp_\w+);)", more, header, flags=re.M)


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of a later version, and its library."""
    folder = tmp_path_factory.mktemp("later")
    shutil.copytree(CSRC, folder / "csrc")
    header = folder / "csrc/include/safepatch.h"
    header.write_text(grown(header.read_text()))
    sources = [path for path in sorted((folder / "csrc").glob("*.cpp")) if path.name != "bindings.cpp"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-missing-field-initializers", "-I", str(header.parent)]

    def compiled(source: Path) -> Path:
        run(CXX, *flags, "-c", source, "-o", source.with_suffix(".o"))
        return source.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    name = f"libsafepatch.so.{constant('SP_ABI_VERSION')}"
    run(CXX, "-shared", *objects, f"-Wl,-soname,{name}", "-pthread", "-o", folder / name)
    return folder


def test_an_older_program_runs_with_a_library_whose_structs_have_grown(
    later: Path, program: list[str], tmp_path: Path
) -> None:
    assert lines(build(PROGRAM, tmp_path, CSRC / "include"), later) == program


def test_a_newer_program_runs_with_this_library_until_it_uses_what_is_new(
    later: Path, program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    include, flag = later / "csrc/include", "-Wno-missing-field-initializers"
    assert lines(build(PROGRAM, tmp_path, include, flag)) == program
    used = PROGRAM.replace("block.start = 3;", "block.start = 3; block.later[1] = 1;")
    used = used.replace(
        "out, cuts, &report) != SP_OK) return 1;", "out, cuts, &report) != SP_OK) return puts(sp_last_error());", 1
    )
    ended = subprocess.run(
        [build(used, tmp_path / "used", include, flag)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(LIB)},
    )
    assert ended.returncode and ended.stdout.splitlines()[-1] == "block"
