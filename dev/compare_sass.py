#!/usr/bin/env python3
"""Compares the machine code (SASS) of two CUDA builds, kernel names aside.

Usage:
    dev/compare_sass.py OLD NEW [--ignore-params] [--cuobjdump PATH]

    dev/compare_sass.py before/libfsa.a libfsa.a
    dev/compare_sass.py before/build build              # folders: all objects, archives, libraries, programs
    dev/compare_sass.py a.o,b.o ab.o                    # several files, separated by commas

OLD and NEW are objects, archives, shared libraries, executables or cubins, or folders that hold them. A
kernel that a side holds several times with the same code counts once.

Two kernels are equal if all of this is equal:
  - the architecture;
  - every instruction with its operands and its encoding, in order, where symbols stand for their order of
    appearance;
  - the resources that cuobjdump -res-usage prints: registers, stack, local and shared memory, constant banks;
  - the launch attributes: offset and size of each parameter, limits on threads and clusters;
  - the contents of the constant banks except bank 0 (the parameters) and bank 4 (addresses);
  - the contents of the module's initialized variables, if the kernel reads addresses from bank 4.
Not compared: names, PTX, debug information, relocations (link what was compiled with -rdc=true first).

The program pairs kernels by code first, so that a renamed kernel matches its old self. It pairs the rest by
the likeness of names and instructions. For each pair that differs it prints the names, the architecture, the
numbers of instructions and registers, and the first instruction that differs. The last line is
    N kernels equal, M differ, K only in OLD, L only in NEW
and says how many of the M have the same instructions and differ in their resources alone.

--ignore-params masks the offsets of kernel parameters in constant bank 0, their layout and their bytes.
Kernels that differ only because fields of a parameter struct moved are then equal. It does not mask the
address of a parameter that the code computes from an immediate (the tensor maps of TMA).

--cuobjdump PATH names the program. By default it is searched in PATH and next to nvcc. It needs nvdisasm
beside it or in PATH. Both come with the CUDA Toolkit, or from PyPI:
    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

Exit code: 0 if all kernels are equal, 1 if not, 2 on errors.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

# Attributes of .nv.info.<kernel> that limit or lay out a launch.
PARAM_CBANK, KPARAM_INFO = 0x0A, 0x17
LAUNCH_ATTRIBUTES = {
    0x05: "max threads",
    0x10: "required threads",
    KPARAM_INFO: "parameter layout",
    0x3D: "cluster size",
    0x3E: "explicit cluster",
    0x3F: "max cluster rank",
}
NV_INFO_WITH_PAYLOAD = 4  # format of an attribute whose value follows its header
MACHINE_CUDA = 190  # e_machine of a cubin
SECTION_NOBITS = 8  # sh_type of a section without contents in the file

FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCHITECTURE = re.compile(r"^\s*code for (\S+)")
COMMENT = re.compile(r"/\*.*?\*/|//.*$")
SYMBOLIC = re.compile(r"`\(.*\)|@\w+\(.*\)")  # `(label) and 32@lo(symbol), where a disassembler prints them
SYMBOL = re.compile(r"(?<![\w.$])[.$A-Za-z_][\w.$]*")
PARAM_OPERAND = re.compile(r"c\[0x0\]\[((?:U?R\d+\S*\+)?)(0x[0-9a-f]+)\]")
PARAM_OFFSET_BITS = 0xFFFF << 38  # a constant operand's byte offset in the first 64 bits of an instruction
USAGE = re.compile(r"([A-Z]+(?:\[\d+\])?):(\d+)")
MIN_LIKENESS = 0.7  # below it two kernels are listed as only in OLD and only in NEW


class Failure(Exception):
    """An error that ends the program with its one-line message."""


@dataclasses.dataclass(slots=True)
class Instruction:
    """One instruction: address in hex digits, text without its comments, encoding in words of 64 bits."""

    address: str
    text: str
    encoding: str

    def __str__(self) -> str:
        return f"{self.text}  {self.encoding}"


@dataclasses.dataclass
class Kernel:
    """One kernel of one architecture. resources holds everything but the code that is compared, by name."""

    arch: str
    name: str
    code: list[Instruction]
    resources: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""  # of the code and the resources
    code_fingerprint: str = ""
    opcodes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def finish(self) -> None:
        """Fills in fingerprints and opcodes, after code and resources are complete."""
        code = hashlib.sha256("\n".join(map(str, self.code)).encode()).hexdigest()
        self.code_fingerprint = code
        self.fingerprint = hashlib.sha256(repr((code, sorted(self.resources.items()))).encode()).hexdigest()
        self.opcodes = collections.Counter(opcode(i.text) for i in self.code)


def opcode(text: str) -> str:
    words = text.split()
    return next((word for word in words if not word.startswith("@")), "")


# ---- cuobjdump -----------------------------------------------------------------------------------


def find_cuobjdump(path: str | None) -> str:
    """Returns the path of cuobjdump: as given, from PATH, or next to nvcc."""
    found = shutil.which(path or "cuobjdump")
    nvcc = shutil.which("nvcc")
    if not found and not path and nvcc:
        found = shutil.which("cuobjdump", path=os.path.dirname(os.path.realpath(nvcc)))
    if not found:
        raise Failure(
            f"{path or 'cuobjdump'}: not found{'' if path else ' in PATH or next to nvcc'}; "
            "pass --cuobjdump PATH, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return os.path.abspath(found)


def run_cuobjdump(program: str, *args: str, cwd: str | None = None) -> str:
    """Returns cuobjdump's output, empty for a file without device code. Raises Failure with its message."""
    path = os.path.dirname(program) + os.pathsep + os.environ.get("PATH", "")
    result = subprocess.run(
        [program, *args], cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    words = " ".join((result.stderr + " " + result.stdout[-500:]).split())
    if result.returncode != 0 and "does not contain device code" not in words:
        raise Failure(f"cuobjdump {' '.join(args)}: exit code {result.returncode}: {words}")
    return result.stdout if result.returncode == 0 else ""


# ---- files, cubins -------------------------------------------------------------------------------


def object_files(side: str, paths: str) -> list[str]:
    """Returns the ELF files and archives among paths (separated by commas) and in their folders."""
    files = set()
    for path in filter(None, paths.split(",")):
        if os.path.isdir(path):
            for folder, _, names in os.walk(path):
                files.update(os.path.realpath(os.path.join(folder, name)) for name in names)
        elif os.path.isfile(path):
            files.add(os.path.realpath(path))
        else:
            raise Failure(f"{side} {path}: no such file or folder")
    return sorted(file for file in files if os.path.isfile(file) and magic(file) in (b"\x7fELF", b"!<ar"))


def magic(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def extract_cubins(program: str, file: str, folder: str) -> list[str]:
    """Writes the cubins of one file into folder. Returns their paths."""
    with open(file, "rb") as f:
        header = f.read(20)
    if (
        len(header) == 20
        and header[:4] == b"\x7fELF"
        and struct.unpack_from("<H", header, 18)[0] == MACHINE_CUDA
    ):
        return [shutil.copy(file, os.path.join(folder, "0.cubin"))]
    run_cuobjdump(program, "-xelf", "all", file, cwd=folder)
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def distinct_cubins(
    program: str, files: list[str], folder: str, pool: concurrent.futures.Executor
) -> dict[str, str]:
    """Returns the cubins of all files, each content once: its hash -> its path."""
    folders = [os.path.join(folder, str(i)) for i in range(len(files))]
    for path in folders:
        os.makedirs(path)
    cubins = {}
    for paths in pool.map(extract_cubins, [program] * len(files), files, folders):
        for path in paths:
            with open(path, "rb") as f:
                cubins[hashlib.sha256(f.read()).hexdigest()] = path
    return cubins


# ---- kernels of a cubin --------------------------------------------------------------------------


def elf_sections(data: bytes) -> dict[str, bytes]:
    """Returns the contents of a cubin's sections by name, those without contents (NOBITS) left out."""
    if data[:5] != b"\x7fELF\x02":
        return {}
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names_at = headers[names_index][4]
    sections = {}
    for name, kind, _, _, offset, length in headers:
        end = data.index(b"\0", names_at + name)
        if kind != SECTION_NOBITS:
            sections[data[names_at + name : end].decode()] = data[offset : offset + length]
    return sections


def nv_info(data: bytes) -> list[tuple[int, bytes]]:
    """Returns the attributes of a section .nv.info.<kernel>: (code, value)."""
    attributes, at = [], 0
    while at + 4 <= len(data):
        form, code, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == NV_INFO_WITH_PAYLOAD:
            attributes.append((code, data[at : at + value]))
            at += value
        else:
            attributes.append((code, struct.pack("<H", value)))
    return attributes


def attribute_text(code: int, value: bytes) -> str:
    """Returns an attribute's value for the report: size and offset of a parameter, numbers, or hex digits."""
    if code == KPARAM_INFO and len(value) == 12:
        offset, flags = struct.unpack_from("<HI", value, 6)
        return f"{flags >> 18} bytes at {offset}"
    if len(value) % 4 == 0:
        return " ".join(map(str, struct.unpack(f"<{len(value) // 4}I", value)))
    return value.hex()


def number_symbols(text: str, numbers: dict[str, int]) -> str:
    """Replaces symbols and labels in an instruction by their order of appearance in the kernel."""
    if "`" not in text and "@" not in text:
        return text

    def rename(symbol: re.Match[str]) -> str:
        return f"symbol{numbers.setdefault(symbol[0], len(numbers))}"

    return SYMBOLIC.sub(lambda part: SYMBOL.sub(rename, part[0]), text)


def parse_sass(output: str) -> list[Kernel]:
    """Splits the output of cuobjdump -sass by architecture and function."""
    kernels: list[Kernel] = []
    arch = ""
    numbers: dict[str, int] = {}
    for line in output.splitlines():
        head, encoding_follows, encoding = line.rpartition("/* 0x")  # /*0010*/  MOV R1, R2 ;  /* 0x... */
        if encoding_follows:
            encoding = "0x" + encoding.rstrip(" */")
            address, _, text = head.strip().removeprefix("/*").partition("*/")
            if address:
                if not kernels:
                    raise Failure(f"cuobjdump -sass: instruction before the first function: {line.strip()}")
                text = COMMENT.sub("", text).strip(" \t;")
                kernels[-1].code.append(Instruction(address, number_symbols(text, numbers), encoding))
            elif kernels and kernels[-1].code:  # the second half of the encoding stands alone on its line
                kernels[-1].code[-1].encoding += " " + encoding
        elif match := FUNCTION.match(line):
            numbers = {}
            kernels.append(Kernel(arch, match[1], []))
        elif match := ARCHITECTURE.match(line):
            arch = match[1]
    return kernels


def parse_usage(output: str) -> dict[str, dict[str, str]]:
    """Returns the resources that cuobjdump -res-usage prints: function -> name -> number."""
    usage: dict[str, dict[str, str]] = {}
    function = ""
    for line in output.splitlines():
        words = line.split()
        if words[:1] == ["Function"]:
            function = words[1].removesuffix(":")
        elif function and "REG:" in line:
            usage[function] = dict(USAGE.findall(line))
    return usage


def mask_params(kernel: Kernel, first: int) -> None:
    """Masks the offsets of operands in constant bank 0 from byte `first` on, where the parameters begin."""
    for instruction in kernel.code:
        masked = PARAM_OPERAND.sub(
            lambda operand: f"c[0x0][{operand[1]}parameter]" if int(operand[2], 16) >= first else operand[0],
            instruction.text,
        )
        if masked != instruction.text:
            low, *rest = instruction.encoding.split()
            low = f"0x{int(low, 16) & ~PARAM_OFFSET_BITS:016x}"
            instruction.text, instruction.encoding = masked, " ".join([low, *rest])


def default_first_param(arch: str) -> int:
    """Returns where parameters begin in constant bank 0, for a cubin that doesn't tell."""
    number = int(re.sub(r"\D", "", arch) or 0)
    return 0x160 if number < 90 else 0x210 if number < 100 else 0x380


def add_elf_resources(kernel: Kernel, sections: dict[str, bytes], ignore_params: bool) -> None:
    """Adds a kernel's launch attributes and constants to its resources. Masks its parameters if asked to."""
    first_param = default_first_param(kernel.arch)
    launch: dict[str, list[str]] = {}
    for code, value in nv_info(sections.get(".nv.info." + kernel.name, b"")):
        if code == PARAM_CBANK and len(value) == 8:
            (first_param,) = struct.unpack_from("<H", value, 4)
        elif code in LAUNCH_ATTRIBUTES and not (code == KPARAM_INFO and ignore_params):
            launch.setdefault(LAUNCH_ATTRIBUTES[code], []).append(attribute_text(code, value))
    kernel.resources.update({name: ", ".join(sorted(values)) for name, values in launch.items()})

    text = "\n".join(instruction.text for instruction in kernel.code)
    for name, data in sections.items():
        own = re.fullmatch(r"\.nv\.constant(\d+)\." + re.escape(kernel.name), name)
        if own and own[1] not in "04":
            kernel.resources[f"contents of constant bank {own[1]}"] = digest(data)
        if name == ".nv.constant3" and "c[0x3]" in text:
            kernel.resources["contents of constant bank 3"] = digest(data)
        if name == ".nv.global.init" and "c[0x4]" in text:
            kernel.resources["contents of initialized variables"] = digest(data)
    if ignore_params:
        kernel.resources.pop("CONSTANT[0]", None)
        mask_params(kernel, first_param)


def digest(data: bytes) -> str:
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"


def check_complete(kernel: Kernel, usage: dict[str, dict[str, str]], sections: dict[str, bytes]) -> None:
    """Raises Failure if the output of cuobjdump was not understood: instructions or resources are missing."""
    size = 8 * sum(len(instruction.encoding.split()) for instruction in kernel.code)
    expected = len(sections.get(".text." + kernel.name, b""))
    if size != expected or kernel.name not in usage:
        raise Failure(
            f"cuobjdump: {kernel.name}: found {size} of {expected} bytes of code"
            f"{'' if kernel.name in usage else ' and no resources'}; try another version of cuobjdump"
        )


def read_cubin(program: str, path: str, ignore_params: bool) -> list[Kernel]:
    """Returns the kernels of one cubin, complete."""
    kernels = parse_sass(run_cuobjdump(program, "-sass", path))
    usage = parse_usage(run_cuobjdump(program, "-res-usage", path))
    with open(path, "rb") as file:
        sections = elf_sections(file.read())
    for kernel in kernels:
        check_complete(kernel, usage, sections)
        kernel.resources.update(usage[kernel.name])
        add_elf_resources(kernel, sections, ignore_params)
        kernel.finish()
    return kernels


def read_sides(program: str, old: str, new: str, ignore_params: bool) -> tuple[list[Kernel], list[Kernel]]:
    """Returns the kernels of OLD and of NEW. Disassembles each distinct cubin once."""
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder, pool:
        sides = []
        for side, paths in (("OLD", old), ("NEW", new)):
            files = object_files(side, paths)
            sides.append(distinct_cubins(program, files, os.path.join(folder, side), pool) if files else {})
            if not sides[-1]:
                raise Failure(f"{side} {paths}: no CUDA machine code; build with nvcc -arch=sm_XX")
        cubins = sides[0] | sides[1]
        read = pool.map(lambda path: read_cubin(program, path, ignore_params), cubins.values())
        kernels = dict(zip(cubins, read))
    return distinct_kernels(kernels, sides[0]), distinct_kernels(kernels, sides[1])


def distinct_kernels(kernels: dict[str, list[Kernel]], cubins: dict[str, str]) -> list[Kernel]:
    found = {(k.arch, k.name, k.fingerprint): k for cubin in cubins for k in kernels[cubin]}
    return [found[key] for key in sorted(found)]


# ---- pairs ---------------------------------------------------------------------------------------


def demangle(names: set[str]) -> dict[str, str]:
    """Returns the demangled names, or the names themselves where c++filt is missing."""
    ordered = sorted(names)
    if not shutil.which("c++filt"):
        return {name: name for name in ordered}
    result = subprocess.run(["c++filt"], input="\n".join(ordered) + "\n", capture_output=True, text=True)
    lines = result.stdout.splitlines()
    return dict(zip(ordered, lines if len(lines) == len(ordered) else ordered))


def overlap(a: collections.Counter[str], b: collections.Counter[str]) -> float:
    """Returns the part of two multisets that is common to both, from 0 to 1."""
    return 2 * (a & b).total() / max(1, a.total() + b.total())


class Likeness:
    """How alike two kernels are. The same instructions give 2 and more, the same name 2; else names and opcodes
    count half each."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.pieces = {
            name: collections.Counter(re.findall(r"[A-Za-z]+|\d+", text)) for name, text in names.items()
        }

    def of_names(self, old: Kernel, new: Kernel) -> float:
        if self.names[old.name] == self.names[new.name]:
            return 2.0
        return overlap(self.pieces[old.name], self.pieces[new.name])

    def of_kernels(self, old: Kernel, new: Kernel) -> float:
        name = self.of_names(old, new)
        if old.code_fingerprint == new.code_fingerprint:
            return 2 + name
        return name if name >= 2 else (name + overlap(old.opcodes, new.opcodes)) / 2


def pair_greedily(old: list[Kernel], new: list[Kernel], score, least: float) -> list[tuple[Kernel, Kernel]]:
    """Pairs kernels, those with the highest score first, and removes them from both lists."""
    scores = [(score(a, b), -i, -j) for i, a in enumerate(old) for j, b in enumerate(new) if a.arch == b.arch]
    used_old: set[int] = set()
    used_new: set[int] = set()
    pairs = []
    for value, i, j in sorted(scores, reverse=True):
        if value >= least and -i not in used_old and -j not in used_new:
            used_old.add(-i)
            used_new.add(-j)
            pairs.append((old[-i], new[-j]))
    old[:] = [kernel for i, kernel in enumerate(old) if i not in used_old]
    new[:] = [kernel for j, kernel in enumerate(new) if j not in used_new]
    return pairs


def pair_kernels(
    old: list[Kernel], new: list[Kernel], likeness: Likeness
) -> tuple[list[tuple[Kernel, Kernel]], list[tuple[Kernel, Kernel]], list[Kernel], list[Kernel]]:
    """Returns the equal pairs, the pairs that differ, and the kernels only in OLD and only in NEW."""
    by_code: dict[tuple[str, str], tuple[list[Kernel], list[Kernel]]] = {}
    for side, kernels in enumerate((old, new)):
        for kernel in kernels:
            by_code.setdefault((kernel.arch, kernel.fingerprint), ([], []))[side].append(kernel)
    equal = []
    for same_old, same_new in by_code.values():
        equal += pair_greedily(same_old, same_new, likeness.of_names, 0)
    rest_old = [kernel for lists in by_code.values() for kernel in lists[0]]
    rest_new = [kernel for lists in by_code.values() for kernel in lists[1]]
    differ = pair_greedily(rest_old, rest_new, likeness.of_kernels, MIN_LIKENESS)
    return equal, differ, rest_old, rest_new


# ---- report --------------------------------------------------------------------------------------


def report_pair(old: Kernel, new: Kernel, names: dict[str, str]) -> None:
    """Prints how two kernels differ."""
    print(f"differs: {old.arch} {names[old.name]}")
    if names[old.name] != names[new.name]:
        print(f"  new name: {names[new.name]}")
    registers = f"{old.resources.get('REG', '?')} -> {new.resources.get('REG', '?')}"
    print(f"  instructions {len(old.code)} -> {len(new.code)}, registers {registers}")
    for name in sorted(old.resources.keys() | new.resources.keys()):
        values = old.resources.get(name, "none"), new.resources.get(name, "none")
        if name != "REG" and values[0] != values[1]:
            print(f"  {name}: {values[0]} -> {values[1]}")
    for i in range(max(len(old.code), len(new.code))):
        lines = [
            str(kernel.code[i]) if i < len(kernel.code) else "(the kernel ends)" for kernel in (old, new)
        ]
        if lines[0] != lines[1]:
            address = (old if i < len(old.code) else new).code[i].address
            print(
                f"  first difference, instruction {i} at 0x{address}:\n    old {lines[0]}\n    new {lines[1]}"
            )
            return
    print("  instructions are equal")


def compare(program: str, old_paths: str, new_paths: str, ignore_params: bool) -> bool:
    """Compares OLD and NEW and prints the report. Returns whether all kernels are equal."""
    old, new = read_sides(program, old_paths, new_paths, ignore_params)
    names = demangle({kernel.name for kernel in old + new})
    equal, differ, only_old, only_new = pair_kernels(old, new, Likeness(names))
    for pair in differ:
        report_pair(*pair, names)
    for side, kernels in (("OLD", only_old), ("NEW", only_new)):
        for kernel in kernels:
            print(f"only in {side}: {kernel.arch} {names[kernel.name]}, {len(kernel.code)} instructions")
    same_code = sum(a.code_fingerprint == b.code_fingerprint for a, b in differ)
    print(
        f"{len(equal)} kernels equal, {len(differ)} differ{f' ({same_code} in resources alone)' * bool(same_code)}, "
        f"{len(only_old)} only in OLD, {len(only_new)} only in NEW"
    )
    return not (differ or only_old or only_new)


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments as one line."""

    def error(self, message: str) -> None:
        raise Failure(f"{message}; see dev/compare_sass.py -h")


def main() -> int:
    parser = Parser(add_help=False, allow_abbrev=False)
    try:
        parser.add_argument("old")
        parser.add_argument("new")
        parser.add_argument("--ignore-params", action="store_true")
        parser.add_argument("--cuobjdump")
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(__doc__.strip())
            return 0
        args = parser.parse_args()
        return 0 if compare(find_cuobjdump(args.cuobjdump), args.old, args.new, args.ignore_params) else 1
    except (Failure, OSError, ValueError, struct.error) as failure:
        print(f"error: {' '.join(str(failure).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
