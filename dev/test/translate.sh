#!/usr/bin/env bash
# translate.sh: tests the emulator's translator: what it writes for each kind of syntax, and that it reports the file
# and the line of code that it leaves to nvcc.
set -u
cd "$(dirname "$0")/../.." || exit 1
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
passed=0 failed=0
check() { if eval "$1"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "FAILED translate.sh: $2"; fi; }
translate() { printf '%b' "$1" >"$T/in.cu"; rm -f "$T/out.cu"; dev/emulator/translate.sh "$T/in.cu" "$T/out.cu" 2>"$T/err"; code=$?; }

# becomes SOURCE WANT: the translation of SOURCE is WANT and has as many lines
becomes() {
    local want
    want=$(printf %b "$2")
    translate "$1"
    check '[ $code -eq 0 ] && [ "$(cat "$T/out.cu")" = "$want" ]' "$1 becomes $(cat "$T/out.cu" "$T/err")"
    check '[ "$(wc -l <"$T/out.cu")" -eq "$(wc -l <"$T/in.cu")" ]' "$1: the lines are others"
}
becomes 'k<<<g, b>>>(x);\n' 'emu::launch(g, b)(k)(x);\n'
becomes 'k<T, 4><<<dim3(1, n >> 2), b, s, t>>>(x, y);\n' 'emu::launch(dim3(1, n >> 2), b, s, t)(k<T, 4>)(x, y);\n'
becomes 'k<T>\n  <<<g(n),\n     b>>>(\n  x);\n' 'emu::launch\n  (g(n),\n     b)(k<T>)(\n  x);\n'
becomes '#define K \\\n  k \\\n  <<<g, b>>>(x)\nint y;\n' '#define K \\\n  emu::launch \\\n  (g, b)(k)(x)\nint y;\n'
becomes 'extern __shared__ float4 smem[];\n' 'float4 *smem = (float4 *)emu::dynamic_smem();\n'
becomes 'extern __shared__ __align__(1024) unsigned char s[];\n' 'unsigned char *s = (unsigned char *)emu::dynamic_smem();\n'
becomes '__shared__ float x[4]; // asm, k<<<1\n' '__shared__ float x[4]; // asm, k<<<1\n'
becomes 'f("asm <<<"); /* asm\n asm */ g(asm_x, my_asm, 1 << 2);\n' 'f("asm <<<"); /* asm\n asm */ g(asm_x, my_asm, 1 << 2);\n'
becomes "c = '\"'; x = '/'; // asm\n" "c = '\"'; x = '/'; // asm\n"

# refuses LINE TEXT SOURCE: an error names the line and the text, and nothing is written
refuses() {
    local line=$1 text=$2
    translate "$3"
    check '[ $code -ne 0 ] && grep -qF -- "$T/in.cu:$line: error: the emulator cannot translate $text: " "$T/err" && [ "$(wc -l <"$T/err")" -eq 1 ]' "$3: $(cat "$T/err")"
    check '[ ! -e "$T/out.cu" ] && [ "$(ls "$T")" = "$(printf "err\nin.cu")" ]' "$3: files are left: $(ls "$T")"
}
refuses 2 '<<<' 'int x;\nk<Pair<int>><<<g, b>>>(x);\n'
refuses 3 '<<<' 'k<<<g,\n  b>>>(x);\n(*f)<<<g, b>>>(x);\n'
refuses 1 'extern __shared__' 'extern __shared__ Tile tiles[][8];\n'
refuses 4 'asm' '/* asm\n */ int x; // asm\n\nif (x) asm volatile("mov.u32 %%0, 1;" : "=r"(x));\n'
refuses 1 '__asm__' '__asm__("");\n'
refuses 2 '__CUDA_ARCH__' '\n#if __CUDA_ARCH__ >= 900\n#endif\n'
refuses 1 '__cluster_dims__' '__global__ void __cluster_dims__(2, 1, 1) k();\n'
refuses 1 'cooperative_groups' '#include <x>  namespace cg = cooperative_groups;\n'
refuses 1 'asm' "c = '\"'; asm(\"\"); d = '\"';\n"

echo "translate: $passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
