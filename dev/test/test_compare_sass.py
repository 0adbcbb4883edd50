"""dev/compare_sass.py as a user meets it, on cubins made here. A stand-in for cuobjdump prints the text that
they carry. make test runs it; it needs neither the CUDA Toolkit nor a GPU."""

import os
import shutil
import struct
import subprocess
import sys
import tempfile

from checks import check, finish

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
PROGRAM = os.path.join(ROOT, "dev/compare_sass.py")

# A cubin here is a small ELF file, MARK, the text of cuobjdump -sass, MARK, the text of -res-usage. An object
# is FATBIN and its cubins, each after CUBIN.
MARK, FATBIN, CUBIN = b"\n--text--\n", b"\x7fELF-fatbin", b"--cubin--"
STAND_IN = f"""#!{sys.executable}
import sys
option, file = sys.argv[1], sys.argv[-1]
data = open(file, "rb").read()
if option == "-xelf":
    if not data.startswith({FATBIN!r}):
        print("cuobjdump info    : File does not contain device code", file=sys.stderr)
        sys.exit(255)
    for i, cubin in enumerate(data.split({CUBIN!r})[1:]):
        open(f"a.{{i}}.sm_90.cubin", "wb").write(cubin)
else:
    print(data.split({MARK!r})[1 if option == "-sass" else 2].decode())
"""
CODE = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   ULDC UR5, c[0x0][0x218] ;              /* 0x0000860000057ab9 */
                                                                          /* 0x000fe20000000800 */
        /*0020*/                   ISETP.GE.AND P0, PT, R0, UR5, PT ;     /* 0x0000000500007c0c */
                                                                          /* 0x000fe2000bf06270 */
        /*0030*/               @P0 BRA `(.L_x_4) ;                        /* 0x0000000000640947 */
                                                                          /* 0x000fea0003800000 */
        /*0040*/                   MOV R20, 32@lo(first_table) ;          /* 0x0000000000147802 */
                                                                          /* 0x000fe20000000f00 */
        /*0050*/                   MOV R21, 32@lo(second_table) ;         /* 0x0000000000157802 */
                                                                          /* 0x000fe20000000f00 */
        /*0060*/                   FFMA R9, -R3, R8, 1 ;                  /* 0x3f80000003097423 */
                                                                          /* 0x000fe20000000108 */
        /*0070*/                   EXIT ;                                 /* 0x000000000000794d */
                                                                          /* 0x000fea0003800000 */
"""


def kernel(
    name: str, code: str = CODE, registers: int = 24, threads: int = 256, constants: bytes = b"2222"
) -> dict:
    return {"name": name, "code": code, "registers": registers, "threads": threads, "constants": constants}


def cubin(*kernels: dict, arch: str = "sm_90") -> bytes:
    """Returns a cubin with kernels: an ELF file with their sections, and what cuobjdump prints about it."""
    sections = [("", 0, b""), (".shstrtab", 3, b"")]
    sass, usage = f"\tcode for {arch}\n\t.target\t{arch}\n", "Resource usage:\n Common:\n  GLOBAL:0\n"
    for k in kernels:
        info = struct.pack("<BBH3I", 4, 0x05, 12, k["threads"], 1, 1)  # EIATTR_MAX_THREADS
        info += struct.pack("<BBHIHH", 4, 0x0A, 8, 0, 0x210, 16)  # EIATTR_PARAM_CBANK
        sections.append((".text." + k["name"], 1, bytes(8 * k["code"].count("/* 0x"))))
        sections.append((".nv.info." + k["name"], 0x70000000, info))
        sections.append((".nv.constant2." + k["name"], 1, k["constants"]))
        sass += (
            f"\n\t\tFunction : {k['name']}\n\t.headerflags\t@\"EF_CUDA_SM90\"\n{k['code']}\t\t..........\n"
        )
        usage += (
            f" Function {k['name']}:\n  REG:{k['registers']} STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:544\n"
        )
    names = b"".join(name.encode() + b"\0" for name, _, _ in sections)
    sections[1] = (".shstrtab", 3, names)
    headers, contents, name_at, offset = b"", b"", 0, 64
    for name, kind, data in sections:
        headers += struct.pack(
            "<IIQQQQIIQQ", name_at, kind, 0, 0, offset + len(contents), len(data), 0, 0, 1, 0
        )
        name_at += len(name) + 1
        contents += data
    elf = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQ", 2, 190, 1, 0, 0, 64 + len(contents))
    elf += struct.pack("<IHHHHHH", 0, 64, 0, 0, 64, len(sections), 1)
    return MARK.join([elf + contents + headers, sass.encode(), usage.encode()])


def write(path: str, *cubins: bytes) -> str:
    """Writes an object with cubins. Returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(FATBIN + b"".join(CUBIN + c for c in cubins))
    return path


def compare(old: str, new: str, *args: str) -> tuple[int, list[str], list[str]]:
    """Runs the program. Returns its exit code and the lines of its output and errors."""
    result = subprocess.run([sys.executable, PROGRAM, old, new, *args], capture_output=True, text=True)
    return result.returncode, result.stdout.splitlines(), result.stderr.splitlines()


def expect(
    what: str, result: tuple[int, list[str], list[str]], code: int, last: str, *contents: str
) -> list[str]:
    """Checks a run: exit code, last line and other lines of the output, empty stderr. Returns the output."""
    output = result[1]
    complete = result[0] == code and output[-1:] == [last] and not result[2]
    missing = [line for line in contents if line not in output]
    check(complete and not missing, f"{what}: code {result[0]}, {output}, {result[2]}; missing: {missing}")
    return output


def expect_error(what: str, result: tuple[int, list[str], list[str]], contents: str) -> None:
    """Checks that a run ended with exit code 2 and one line on stderr that has contents."""
    right = result[0] == 2 and not result[1] and len(result[2]) == 1 and result[2][0].startswith("error: ")
    check(right and contents in result[2][0], f"{what}: {result}")


def summary(equal: int, differ: int = 0, only_old: int = 0, only_new: int = 0, same_code: int = 0) -> str:
    resources = f" ({same_code} in resources alone)" if same_code else ""
    return f"{equal} kernels equal, {differ} differ{resources}, {only_old} only in OLD, {only_new} only in NEW"


def test_equal(tmp: str, tool: list[str]) -> None:
    """Names of kernels, symbols and labels do not count. A kernel that two files hold counts once."""
    old = write(f"{tmp}/old/a.o", cubin(kernel("_Z4turnPfi"), kernel("_Z5mergePfi", registers=40)))
    expect("the same file", compare(old, old, *tool), 0, summary(2))
    renamed = (
        CODE.replace("first_table", "cosines").replace("second_table", "sines").replace(".L_x_4", ".L_x_99")
    )
    renamed = renamed.replace("EXIT ;", "EXIT /* the end */ ;")
    new = write(
        f"{tmp}/new/b.o", cubin(kernel("_Z4ropePfi", renamed)), cubin(kernel("_Z7combinePfi", renamed, 40))
    )
    expect("renamed kernels", compare(old, new, *tool), 0, summary(2))
    write(f"{tmp}/new/copy.o", cubin(kernel("_Z4ropePfi", renamed), kernel("_Z7combinePfi", CODE, 40)))
    shutil.copy(PROGRAM, f"{tmp}/new/text.py")
    expect("a folder", compare(old, f"{tmp}/new", *tool), 0, summary(2))
    expect("files with commas", compare(old, f"{new},{tmp}/new/copy.o", *tool), 0, summary(2))
    bare = f"{tmp}/bare.cubin"
    with open(bare, "wb") as file:
        file.write(cubin(kernel("_Z4turnPfi"), kernel("_Z5mergePfi", registers=40)))
    expect("a cubin", compare(old, bare, *tool), 0, summary(2))


def test_differences(tmp: str, tool: list[str]) -> None:
    """Each thing that is compared is noticed, and the report names it."""
    name = "_Z4turnPfi"
    old = write(f"{tmp}/old.o", cubin(kernel(name)))
    constant = CODE.replace("R8, 1 ;", "R8, 2 ;").replace("0x3f80000003097423", "0x4000000003097423")
    changes = {
        "a constant": (
            kernel(name, constant),
            "    new FFMA R9, -R3, R8, 2  0x4000000003097423 0x000fe20000000108",
        ),
        "an encoding": (
            kernel(name, CODE.replace("0x000fe20000000108", "0x000fe40000000108")),
            "  first difference, instruction 6 at 0x0060:",
        ),
        "swapped symbols": (
            kernel(name, CODE.replace("32@lo(second_table)", "32@lo(first_table)")),
            "  first difference, instruction 5 at 0x0050:",
        ),
        "an instruction more": (
            kernel(
                name, CODE + CODE.splitlines(True)[-2].replace("0070", "0080") + CODE.splitlines(True)[-1]
            ),
            "    old (the kernel ends)",
        ),
        "registers": (kernel(name, registers=25), "  instructions 8 -> 8, registers 24 -> 25"),
        "threads": (kernel(name, threads=128), "  max threads: 256 1 1 -> 128 1 1"),
        "a constant bank": (kernel(name, constants=b"3333"), "  instructions are equal"),
    }
    for what, (changed, line) in changes.items():
        new = write(f"{tmp}/new.o", cubin(changed))
        same_code = int(what in ("registers", "threads", "a constant bank"))
        for args in ([], ["--ignore-params"]):
            result = compare(old, new, *tool, *args)
            expect(f"{what} {args}", result, 1, summary(0, 1, same_code=same_code), line)
    # A new name and other resources: the instructions pair the kernels.
    new = write(f"{tmp}/new.o", cubin(kernel("_Z5otherPKc", registers=25)))
    expect("renamed, other resources", compare(old, new, *tool), 1, summary(0, 1, same_code=1))
    new = write(f"{tmp}/new.o", cubin(kernel(name), arch="sm_80"))
    expect("architecture", compare(old, new, *tool), 1, summary(0, 0, 1, 1))
    demangled = "turn(float*, int)" if shutil.which("c++filt") else name
    added = "rows::add_many<4>" if shutil.which("c++filt") else "_ZN4rows8add_manyILi4EEEvPf"
    short = "".join(CODE.splitlines(True)[:4])
    new = write(f"{tmp}/new.o", cubin(kernel(name), kernel("_ZN4rows8add_manyILi4EEEvPf", short)))
    output = expect("a new kernel", compare(old, new, *tool), 1, summary(1, 0, 0, 1))
    check(output[0].startswith("only in NEW: sm_90 ") and added in output[0], f"a new kernel: {output}")
    new = write(f"{tmp}/new.o", cubin(kernel("_Z9turn_backPfi", constant)))
    output = expect(
        "renamed and changed", compare(old, new, *tool), 1, summary(0, 1), f"differs: sm_90 {demangled}"
    )
    check("  new name: " in output[1], f"renamed and changed: {output}")
    new = write(f"{tmp}/new.o", cubin(kernel(name), kernel("_Z4turnPfj")))
    expect("one of two equal kernels only in NEW", compare(old, new, *tool), 1, summary(1, 0, 0, 1))


def test_params(tmp: str, tool: list[str]) -> None:
    """--ignore-params masks the offsets of parameters, and nothing else of constant bank 0."""
    old = write(f"{tmp}/old.o", cubin(kernel("_Z4turnPfi")))
    moved = CODE.replace("c[0x0][0x218]", "c[0x0][0x220]").replace("0x0000860000057ab9", "0x0000880000057ab9")
    new = write(f"{tmp}/new.o", cubin(kernel("_Z4turnPfi", moved)))
    expect("a parameter moved", compare(old, new, *tool), 1, summary(0, 1))
    expect("a parameter moved, ignored", compare(old, new, *tool, "--ignore-params"), 0, summary(1))
    register = moved.replace("0x0000880000057ab9", "0x0000880000067ab9").replace("ULDC UR5", "ULDC UR6")
    new = write(f"{tmp}/new.o", cubin(kernel("_Z4turnPfi", register)))
    expect("another register too", compare(old, new, *tool, "--ignore-params"), 1, summary(0, 1))
    encoding = moved.replace("0x0000880000057ab9", "0x0000880002057ab9")
    new = write(f"{tmp}/new.o", cubin(kernel("_Z4turnPfi", encoding)))
    expect("another encoding too", compare(old, new, *tool, "--ignore-params"), 1, summary(0, 1))
    stack = CODE.replace("c[0x0][0x28]", "c[0x0][0x20]").replace("0x00000a00ff017b82", "0x00000800ff017b82")
    new = write(f"{tmp}/new.o", cubin(kernel("_Z4turnPfi", stack)))
    expect(
        "another word before the parameters", compare(old, new, *tool, "--ignore-params"), 1, summary(0, 1)
    )


def test_errors(tmp: str, tool: list[str]) -> None:
    old = write(f"{tmp}/old.o", cubin(kernel("_Z4turnPfi")))
    expect_error("a missing file", compare(old, f"{tmp}/none.o", *tool), f"NEW {tmp}/none.o: no such file")
    with open(f"{tmp}/cpu.o", "wb") as file:
        file.write(b"\x7fELF\x02\x01\x01" + bytes(57))
    expect_error("no device code", compare(f"{tmp}/cpu.o", old, *tool), "no CUDA machine code")
    expect_error("a text", compare(old, PROGRAM, *tool), "no CUDA machine code")
    expect_error("a missing tool", compare(old, old, "--cuobjdump", f"{tmp}/none"), "nvidia-cuda-cuobjdump")
    expect_error("a wrong flag", compare(old, old, *tool, "--ignore"), "--ignore")
    failing = shutil.which("false") or "/bin/false"
    expect_error("a failing tool", compare(old, old, "--cuobjdump", failing), "exit code 1")
    lost = cubin(kernel("_Z4turnPfi")).replace(b"        /*0060*/", b"        //0060//")
    lost = lost.replace(b"/* 0x3f80000003097423 */", b"")
    expect_error(
        "a line not understood", compare(old, write(f"{tmp}/lost.o", lost), *tool), "120 of 128 bytes"
    )


def main() -> None:
    tmp = tempfile.mkdtemp()
    try:
        tool = f"{tmp}/cuobjdump"
        with open(tool, "w") as file:
            file.write(STAND_IN)
        os.chmod(tool, 0o755)
        for test in (test_equal, test_differences, test_params, test_errors):
            folder = f"{tmp}/{test.__name__}"
            os.makedirs(folder)
            test(folder, ["--cuobjdump", tool])
    finally:
        shutil.rmtree(tmp)
    finish()


if __name__ == "__main__":
    main()
