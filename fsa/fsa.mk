# fsa.mk: the library libfsa, its example, its installation, and the wheel of the PyTorch package.

# config_lib.o has no -march=native, so that the library runs on other CPUs too.
FSA_SOURCES := $(wildcard fsa/*.cu fsa/sm80/*.cu fsa/sm90/*.cu)
FSA := $(FSA_SOURCES:%.cu=$(BUILD)/%.o) $(BUILD)/fsa/config_lib.o
$(BUILD)/fsa/config_lib.o: fsa/config.c $(BUILD)/c.flags
	$(START)$(CC) -std=gnu11 -O2 -fPIC -fvisibility=hidden -MMD -MP -c $< -o $@
$(BUILD)/example: fsa/example.c fsa/fsa.h $(LIBFSA).a $(BUILD)/nvcc.flags
	$(START)$(NVCC) $(GENCODE) $(filter %.c %.a,$^) -o $@

$(LIBFSA).a: $(FSA) ; $(START)rm -f $@ && ar qcs $@ $^
$(LIBFSA).so.0: $(FSA)
	$(START)$(NVCC) $(GENCODE) -shared -Xlinker -soname=$(@F) $^ -o $@
	@! nm -D --defined-only $@ | grep -v ' T fsa_' || { echo "error: $@ exports these symbols, which fsa.h does not declare" >&2; rm $@; exit 1; }
$(LIBFSA).so: $(LIBFSA).so.0 ; $(START)ln -sf $(<F) $@

# ---- the PyTorch package (torch/): a wheel with libfsa.so for sm_80, sm_90a and, as PTX, later GPUs -------------------
# setup.py runs make again, with its own BUILD. pip needs no network if setuptools can build wheels.
wheel:
	@env -u MAKEFLAGS NVCC=$(or $(NVCC),$(NO_NVCC)) python3 -m pip wheel -q --no-deps -w $(BUILD)/dist ./fsa/torch \
	    $$(python3 -c 'import setuptools.command.bdist_wheel' 2>/dev/null && echo --no-build-isolation)
	@ls $(BUILD)/dist/flash_sparse_attention-$(FSA_VERSION)-*.whl

# ---- installation: libfsa.a, libfsa.so, fsa.h, and fsa.pc for pkg-config; DESTDIR is a staging folder ---------------
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DOCDIR ?= $(PREFIX)/share/doc/fsa
FSA_VERSION = $(shell awk '/define FSA_VERSION_/ {printf sep $$3; sep = "."}' fsa/fsa.h)
CUDA_LIBDIR = $(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib))
# A static link also needs the CUDA runtime and the C++ runtime.
define FSA_PC
prefix=$(PREFIX)
libdir=$(LIBDIR)
includedir=$(INCLUDEDIR)

Name: fsa
Description: Native Sparse Attention and full attention on NVIDIA GPUs, forward and backward
Version: $(FSA_VERSION)
Cflags: -I$${includedir}
Libs: -L$${libdir} -lfsa
Libs.private: -L$(CUDA_LIBDIR) -lcudart_static -lstdc++ -lm -ldl -lrt -lpthread
endef
export FSA_PC
install: $(LIBFSA).a $(LIBFSA).so
	install -d '$(DESTDIR)$(LIBDIR)/pkgconfig' '$(DESTDIR)$(INCLUDEDIR)' '$(DESTDIR)$(DOCDIR)'
	install -m 644 $(LIBFSA).a '$(DESTDIR)$(LIBDIR)/libfsa.a'
	install -m 755 $(LIBFSA).so.0 '$(DESTDIR)$(LIBDIR)/libfsa.so.0'
	ln -sf libfsa.so.0 '$(DESTDIR)$(LIBDIR)/libfsa.so'
	install -m 644 fsa/fsa.h '$(DESTDIR)$(INCLUDEDIR)/fsa.h'
	install -m 644 LICENSE '$(DESTDIR)$(DOCDIR)/LICENSE'
	printf '%s\n' "$$FSA_PC" >'$(DESTDIR)$(LIBDIR)/pkgconfig/fsa.pc'
uninstall:
	rm -f '$(DESTDIR)$(LIBDIR)/libfsa.a' '$(DESTDIR)$(LIBDIR)/libfsa.so' '$(DESTDIR)$(LIBDIR)/libfsa.so.0' \
	    '$(DESTDIR)$(INCLUDEDIR)/fsa.h' '$(DESTDIR)$(LIBDIR)/pkgconfig/fsa.pc' '$(DESTDIR)$(DOCDIR)/LICENSE'
	rmdir '$(DESTDIR)$(DOCDIR)' 2>/dev/null || true
