#!/usr/bin/env bash
# Tests make wheel, and the wheel in a clean virtual environment. In place of nvcc stands a compiler of an empty library:
# what counts here is what the wheel contains. Needs pip, and setuptools 70.1 or later.
set -u
root=$PWD PROGRAM=$(command -v make)
unset LIBFSA MAKEFLAGS # of the make that runs this test
. dev/test/checks.sh
if ! python3 -m pip --version >out 2>&1 || ! python3 -c 'import setuptools.command.bdist_wheel' 2>err; then
    echo "skipped: make wheel: python3 has no pip, or no setuptools from 70.1 on"
    skipped=1
    finish_test
    exit
fi
# A copy of what make needs, so that nothing comes into this tree.
mkdir tree && (cd "$root" && find Makefile LICENSE fsa dev -name '*.mk' -o -path 'fsa/*' -not -name '*.pyc' -type f -o \
    -path 'fsa/*' -type l -o -name LICENSE -o -name Makefile) | tar -C "$root" -cf - -T - | tar -C tree -xf -
cat >nvcc <<'END'
#!/usr/bin/env bash
# Makes what stands behind -o: an object, or a shared library with one function of fsa.h.
while [ "$1" != -o ]; do case $1 in -shared) library=1 ;; -gencode) echo "$2" >>"$(dirname "$0")/targets" ;; esac; shift; done
if [ "${library:-}" ]; then echo 'int fsa_version(void) { return 1; }' | cc -shared -fPIC -x c - -o "$2"
else echo 'int unused;' | cc -fvisibility=hidden -fPIC -x c -c - -o "$2"; fi
END
chmod +x nvcc
files() { (cd tree && find . -path ./build -prune -o -name __pycache__ -prune -o -print | sort); }
files >before
make -C tree NVCC="$T/nvcc" GPU= SAN= COMMIT=test wheel >out 2>err
code=$?
check '[ $code -eq 0 ]' "make wheel: $(cat out err)"
files >after
check 'cmp -s before after' "make wheel leaves $(comm -13 before after | tr '\n' ' ')"
for target in compute_80,code=sm_80 compute_90a,code=sm_90a compute_80,code=compute_80; do
    check 'grep -q "arch=$target$" targets' "libfsa.so is not built for $target"
done
version=$(sed -n 's/#define FSA_VERSION_[A-Z]* //p' "$root/fsa/fsa.h" | paste -sd.)
wheel=tree/build/dist/flash_sparse_attention-$version-py3-none-$(python3 -c 'import sysconfig; print(sysconfig.get_platform().replace("-", "_"))').whl
check '[ -f "$wheel" ]' "no $wheel: $(ls tree/build/dist 2>&1)"
python3 -m zipfile -l "$wheel" | awk 'NR > 1 { print $1 }' | sort >inside
for file in $(cd "$root/fsa/torch" && ls flash_sparse_attention/*.py) flash_sparse_attention/libfsa.so \
    "flash_sparse_attention-$version.dist-info/licenses/LICENSE"; do
    check 'grep -qx "$file" inside' "the wheel has no $file: $(tr '\n' ' ' <inside)"
done
check '[ "$(grep -c . inside)" -eq "$(grep -cE "^flash_sparse_attention/.*\.(py|so)$|^flash_sparse_attention-$version.dist-info/" inside)" ]' "the wheel has other files: $(tr '\n' ' ' <inside)"

# A clean virtual environment. It sees the PyTorch of this Python, if there is one.
python3 -m venv --without-pip clean
site=$(clean/bin/python -c 'import site; print(site.getsitepackages()[0])')
python3 -m pip install -q --no-index --no-deps --target "$site" "$wheel" >out 2>err
code=$?
check '[ $code -eq 0 ]' "the wheel does not install: $(cat out err)"
if torch=$(python3 -c 'import torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); then
    echo "$torch" >"$site/torch.pth"
    cat >use.py <<'END'
import torch, flash_sparse_attention as fsa
from flash_sparse_attention import library
q = torch.ones(9, 2, 64)
print(fsa.__version__, fsa.attention(q, q, q).sum().item())
try:
    library.load()
except RuntimeError as error:
    print(error)
END
    clean/bin/python use.py >out 2>err
    code=$?
    check '[ $code -eq 0 ] && [ "$(sed -n 1p out)" = "$version 1152.0" ]' "the wheel's package does not work: $(cat out err)"
    # The empty library is found in the wheel, and refused.
    check 'grep -q "^libfsa.so: cannot be loaded from $(realpath "$site")/flash_sparse_attention/libfsa.so: .*undefined symbol" out' "the wheel's library: $(cat out err)"
else
    echo "skipped: use of the wheel: PyTorch is not installed"
    skipped=1
fi

# Without nvcc: one clear line.
make -C tree NVCC= SAN= wheel >out 2>err
code=$?
check '[ $code -ne 0 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "wheel needs nvcc, which was not found: install the CUDA Toolkit or set NVCC=" err' "make wheel without nvcc: $(cat out err)"
NVCC=/none/nvcc python3 -m pip wheel --no-deps --no-build-isolation -w none tree/fsa/torch >out 2>&1
code=$?
check '[ $code -ne 0 ] && grep -q "error: libfsa.so needs nvcc, which was not found at /none/nvcc: install the CUDA Toolkit or set NVCC" out' "pip wheel without nvcc: $(cat out)"
# With an old setuptools: one line too. None in sys.modules makes an import fail.
python3 -c 'import runpy, sys
sys.modules["setuptools.command.bdist_wheel"] = None
runpy.run_path(sys.argv[1])' tree/fsa/torch/setup.py >out 2>err
code=$?
check '[ $code -ne 0 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "^error: setuptools .*: must be 70.1 or later; try pip install" err' "setup.py with an old setuptools: $(cat out err)"
finish_test
