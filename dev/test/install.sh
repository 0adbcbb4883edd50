#!/usr/bin/env bash
# Tests make install: the example builds against the installed tree alone, with gcc, clang and, as C++, g++, shared and
# static; the version is that of fsa.h; make uninstall removes all files. Needs libfsa.a and libfsa.so, which make cuda builds.
set -u
root=$PWD PROGRAM=$(command -v make)
. dev/test/checks.sh
if [ ! -f "$root/libfsa.so.0" ] || [ ! -f "$root/libfsa.a" ]; then
    echo "skipped: make install: libfsa.a and libfsa.so are not built; make cuda builds them"
    skipped=1
    finish_test
    exit
fi
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=$(dirname "$(dirname "$(realpath "$nvcc")")")
stage=$PWD/stage
make -C "$root" -s install PREFIX=/opt/fsa DESTDIR="$stage" >out 2>err || bad "make install: $(cat out err)"
tree=$stage/opt/fsa
check '[ "$(cd "$tree" && find . -type f -o -type l | sort | tr "\n" " ")" = "./include/fsa.h ./lib/libfsa.a ./lib/libfsa.so ./lib/libfsa.so.0 ./lib/pkgconfig/fsa.pc ./share/doc/fsa/LICENSE " ]' "the installed files: $(find "$tree" | sort | tr "\n" " ")"
check '[ "$(readlink "$tree/lib/libfsa.so")" = libfsa.so.0 ]' "libfsa.so is not a link to libfsa.so.0"
check 'grep -q "^prefix=/opt/fsa$" "$tree/lib/pkgconfig/fsa.pc"' "fsa.pc: $(cat "$tree/lib/pkgconfig/fsa.pc")"
version=$(sed -n 's/#define FSA_VERSION_[A-Z]* //p' "$root/fsa/fsa.h" | paste -sd.)
check '[ "$(sed -n "s/^Version: //p" "$tree/lib/pkgconfig/fsa.pc")" = "$version" ]' "fsa.pc is not of version $version"

# pkg-config's flags, with the stage in front of the paths
cp "$root/fsa/example.c" .
if command -v pkg-config >/dev/null; then
    pc() { PKG_CONFIG_PATH=$tree/lib/pkgconfig pkg-config --define-variable=prefix="$tree" \
        --define-variable=libdir="$tree/lib" --define-variable=includedir="$tree/include" "$@" fsa; }
else
    echo "skipped: pkg-config is not installed; the flags are read from fsa.pc"
    skipped=1
    pc() { case $* in *cflags*) echo "-I$tree/include" ;; *static*) echo "-L$tree/lib -lfsa -L$cuda/lib64 -lcudart_static -lstdc++ -lm -ldl -lrt -lpthread" ;; *) echo "-L$tree/lib -lfsa" ;; esac; }
fi
runtime="-I$cuda/include -L$cuda/lib64"
for compiler in gcc clang g++; do
    if ! command -v $compiler >/dev/null; then
        echo "skipped: $compiler is not installed"
        skipped=1
        continue
    fi
    $compiler example.c $(pc --cflags) $runtime $(pc --libs) -lcudart -lm -o shared >out 2>&1
    code=$?
    check '[ $code -eq 0 ] && [ ! -s out ]' "$compiler, shared: $(cat out)"
    check 'readelf -d shared | grep -q "NEEDED.*libfsa.so.0"' "$compiler: the program does not need libfsa.so.0"
    mkdir -p only && mv "$tree"/lib/libfsa.so* only/
    $compiler example.c $(pc --cflags) $runtime $(pc --static --libs) -o static >out 2>&1
    code=$?
    check '[ $code -eq 0 ] && [ ! -s out ]' "$compiler, static: $(cat out)"
    mv only/libfsa.so* "$tree/lib/"
    LD_LIBRARY_PATH=$tree/lib:$cuda/lib64 ./shared >out 2>err
    code=$?
    if [ $code -eq 0 ]; then
        ./static >out 2>err
        code=$?
        check '[ $code -eq 0 ]' "$compiler, static program: $(cat out err)"
    else # without a GPU it ends with one line
        check '[ $code -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: " err' "$compiler: exit code $code: $(cat out err)"
    fi
done
make -C "$root" -s uninstall PREFIX=/opt/fsa DESTDIR="$stage" >out 2>err || bad "make uninstall: $(cat out err)"
check '[ -z "$(find "$stage" -type f -o -type l)" ]' "make uninstall leaves $(find "$stage" -type f | tr "\n" " ")"
finish_test
