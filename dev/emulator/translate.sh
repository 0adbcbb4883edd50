#!/usr/bin/env bash
# translate.sh FROM TO: a CUDA source as C++ for the emulator: launches become calls, and dynamic shared
# memory a pointer. fsa/sm*/ptx.cuh, the inline PTX, are replaced by the emulator's.
set -eu
case $1 in fsa/sm*/ptx.cuh) from=dev/emulator/${1#fsa/} ;; *) from=$1 ;; esac
mkdir -p "$(dirname "$2")"
sed -zE -e 's/([A-Za-z_0-9]+(<[^<>;(){}]*>)?)[ \\\n]*<<<(([^>]|>[^>]|>>[^>])*)>>>[ \\\n]*\(/emu::launch(\3)(\1)(/g' \
    -e 's/extern __shared__( __align__\([0-9]+\))? ([A-Za-z0-9_ ]+) ([A-Za-z0-9_]+)\[\];/\2 *\3 = (\2 *)emu::dynamic_smem();/g' \
    "$from" >"$2.tmp"
mv "$2.tmp" "$2"
