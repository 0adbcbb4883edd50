#!/usr/bin/env bash
# translate.sh SOURCE OUTPUT: translates a CUDA source to C++ for the emulator, line by line. Launches become calls,
# dynamic shared memory becomes a pointer, and the emulator's files replace fsa/sm*/ptx.cuh and llmc/ptx.cuh, which
# hold the inline PTX.
# Fails if the result still has code that only nvcc understands. README.md lists the syntax that it takes.
set -eu
cd "$(dirname "$0")/../.."
case $1 in
fsa/sm*/ptx.cuh) source=dev/emulator/${1#fsa/} ;;
llmc/ptx.cuh) source=dev/emulator/$1 ;;
*) source=$1 ;;
esac
mkdir -p "$(dirname "$2")"
sed -zE -e 's/([A-Za-z_0-9]+(<[^<>;(){}]*>)?)([ \\\n]*)<<<(([^>]|>[^>]|>>[^>])*)>>>([ \\\n]*)\(/emu::launch\3(\4)\6(\1)(/g' \
    -e 's/extern __shared__( __align__\([0-9]+\))? ([A-Za-z0-9_ ]+) ([A-Za-z0-9_]+)\[\];/\2 *\3 = (\2 *)emu::dynamic_smem();/g' \
    "$source" >"$2.tmp"
awk -v source="$source" -f dev/emulator/untranslated.awk "$2.tmp" >&2 || { rm "$2.tmp"; exit 1; }
mv "$2.tmp" "$2"
