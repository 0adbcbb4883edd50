# Makefile: builds what this machine can build and run. `make help` lists the goals and what it found. fsa/fsa.mk has the rules of
# the library, dev/cuda/cuda.mk those of CUDA code, dev/test/test.mk the tests', dev/emulator/emulator.mk those of kernels on the CPU.
# CC, CFLAGS, CXX, NVCC, GPU (90: compute capability 9.0) and BUILD can be set. BUILD: folder of objects, and of the trainers and the
# library if it is not build. GPU=, NCCL= and MPI= leave these out. V=1 shows all commands. COMMIT: the trainers' commit, for a copy
# without git. SAN=1: address and undefined-behaviour sanitizers, no GPU, no MPI.
MAKEFLAGS += -r
ifeq ($(filter -j%,$(MAKEFLAGS)),) # nvcc takes minutes on one core
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif
BUILD := build$(if $(filter 1,$(SAN)),/san)
OUT := $(if $(filter build,$(BUILD)),,$(BUILD)/)
COMMIT ?= $(or $(shell git --git-dir=.git describe --always --dirty 2>/dev/null),unknown)

# ---- what this machine has ---------------------------------------------------------------------------------------
comma := ,
try = $(shell printf '$(2)\n' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo yes)
HAS_OPENMP := $(call try,-fopenmp,int omp_get_max_threads(void); int main(void){return omp_get_max_threads() < 1;})
HAS_NATIVE := $(call try,-march=native,int main(void){return 0;})
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
GPU := $(if $(filter 1,$(SAN)),,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. '))
USE_GPU := $(and $(NVCC),$(GPU))
NO_NVCC_NOTE := $(if $(GPU),$(if $(NVCC),,echo "note: there is a GPU but no nvcc; with the CUDA Toolkit make would use the GPU"))
# NCCL: the GPU trainer can run as several processes. MPI: mpirun starts them. The sanitizers would report MPI's deliberate leaks.
CUDA_HOME := $(if $(NVCC),$(abspath $(dir $(realpath $(NVCC)))..),/usr/local/cuda)
NCCL_LIBS := $(patsubst %,-L%,$(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib))
NCCL := $(if $(firstword $(wildcard $(addsuffix /nccl.h,$(CUDA_HOME)/include /usr/include /usr/local/include))),$(call try,-Wl$(comma)--no-as-needed $(NCCL_LIBS) -lnccl,int ncclCommSplit(void); int main(void){return ncclCommSplit();}))
MPI := $(if $(filter 1,$(SAN)),,$(if $(shell command -v mpicc 2>/dev/null),yes))
MPI_FLAGS := $(if $(MPI),-DUSE_MPI $(filter -I%,$(shell mpicc -show 2>/dev/null)))
MPI_LIBS := $(if $(MPI),$(filter -L% -l%,$(shell mpicc -show 2>/dev/null)))

# ---- goals -------------------------------------------------------------------------------------------------------
PRECISION := bf16
$(if $(filter bf16 fp16 fp32,$(PRECISION)),,$(error PRECISION=$(PRECISION): must be bf16, fp16 or fp32))
CPU_TRAINER := $(OUT)train_gpt_nsa_cpu
GPU_TRAINER := $(OUT)train_gpt_nsa$(if $(filter-out bf16,$(PRECISION)),_$(PRECISION))
LIBFSA := $(OUT)libfsa
MAKERS := $(BUILD)/recall $(BUILD)/text

.PHONY: all help train data test test-large test-emulator faults faults-emulator fuzz sanitize bench peers install uninstall wheel cuda cuda-all clean FORCE
all: $(CPU_TRAINER) $(MAKERS) $(if $(USE_GPU),$(GPU_TRAINER))
	@$(if $(USE_GPU)$(filter 1,$(SAN)),,$(if $(NVCC),echo "note: no GPU here: $(GPU_TRAINER) was not built; make $(GPU_TRAINER) builds it for another machine",$(NO_NVCC_NOTE)))

help:
	@echo "make train          build, make the recall data, train on it; ARGS='-flag value ...' adds flags,"
	@echo "                    GPU= trains on the CPU, PRECISION=fp16 or fp32 builds the GPU trainer for these"
	@echo "make libfsa.a       build the attention alone, as a static library; libfsa.so: as a shared one (needs nvcc)"
	@echo "make install        install both, fsa.h and fsa.pc below PREFIX (/usr/local); DESTDIR=; make uninstall removes them"
	@echo "make wheel          build the PyTorch package, a wheel with libfsa.so, into $(BUILD)/dist (needs nvcc and pip)"
	@echo "make test           build and run the tests of this machine; SAN=1: with address and undefined-behaviour sanitizers"
	@echo "make test-emulator  run the GPU trainer and every kernel on the CPU, at small sizes (needs the CUDA Toolkit's headers)"
	@echo "make test-large     test the GPU library with up to 1,000,000 tokens (needs a GPU)"
	@echo "make bench          time the kernels of this machine"
	@echo "make peers          time other people's attention kernels beside ours (needs a GPU and PyTorch); ARGS= adds flags"
	@echo "make cuda           compile all CUDA code for this GPU; without a GPU, for sm_80 and sm_90a (needs nvcc)"
	@echo "make cuda-all       compile all CUDA code for all architectures, into $(BUILD)/all (needs nvcc)"
	@echo "make sanitize       compute-sanitizer over the GPU library's tests (needs a GPU)"
	@echo "make faults         plant faults in the C sources, one at a time, and check that a test fails for each"
	@echo "make faults-emulator  the same in the GPU trainer (needs the CUDA Toolkit's headers)"
	@echo "make fuzz           mutated files, random flags, kills, hostile peers; SECONDS=600: ten minutes each"
	@echo "make clean          remove what was built; data and checkpoints stay"
	@echo "found: $(CC); OpenMP: $(or $(HAS_OPENMP),no); -march=native: $(or $(HAS_NATIVE),no); nvcc: $(or $(NVCC),no); GPU: $(if $(GPU),sm_$(GPU),none); NCCL: $(or $(NCCL),no); MPI: $(or $(MPI),no)"

# The default task: recall facts from up to 256 tokens ago on the CPU, 1,024 on a GPU. A second run resumes, or shows the result.
PROMPT := Remember Mara : lamp . Remember Ruth : key . Recall Mara :
ifneq ($(USE_GPU),)
TRAINER := $(GPU_TRAINER)
TASK := recall1k
TASK_DATA := -t 1024 -n 24000
TASK_FLAGS := -e recall-1k -b 16 -x 1500 -l 1e-3 -u 150 -q 0 -beta2 0.98 -v 500 -m 0 -n 500 -s 500 -g 16
else
TRAINER := $(CPU_TRAINER)
TASK := recall
TASK_FLAGS := -e recall -b 2 -x 1200 -l 2e-3 -u 150 -q 0 -beta2 0.98 -v 300 -m 0 -n 300 -s 600 -g 16
endif
RECALL := -i 'data/$(TASK)/recall_train_*.bin' -j 'data/$(TASK)/recall_val_*.bin' -o log/$(TASK) -y 1 -prompt "$(PROMPT)"

data: $(MAKERS)
	@$(BUILD)/recall -o data/$(TASK) $(TASK_DATA)
train: $(TRAINER) data
	@$(NO_NVCC_NOTE)
	@$(if $(findstring /,$(TRAINER)),,./)$(TRAINER) $(TASK_FLAGS) $(RECALL) $(ARGS)
	@ARGS='$(subst ','\'',$(ARGS))' PROMPT='$(PROMPT)' BUILD=$(BUILD) bash scripts/after_train.sh $(TASK) $(TRAINER)

clean:
	rm -rf $(BUILD) $(addprefix $(OUT),train_gpt_nsa_cpu train_gpt_nsa train_gpt_nsa_fp16 train_gpt_nsa_fp32 libfsa.a libfsa.so libfsa.so.0)

# ---- the C programs ----------------------------------------------------------------------------------------------
# No -ffast-math: it would break the checks for NaN. -fno-math-errno lets sqrt be one instruction.
CFLAGS ?= -O3
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CFLAGS_ALL := -std=gnu11 -Wall -Wextra -fno-math-errno $(CFLAGS) $(if $(HAS_NATIVE),-march=native) \
    $(if $(HAS_OPENMP),-fopenmp,-Wno-unknown-pragmas) $(if $(filter 1,$(SAN)),$(SANITIZE))
LDLIBS := -lm -lpthread

# Begins a recipe: makes the target's folder, and prints the target. V=1 prints the command instead.
START = $(if $(V),,@echo "  $@"; )mkdir -p $(@D);
# NAME.flags holds FLAGS_NAME, the flags of the objects that depend on it. It is made again if the flags have changed.
define FLAGS_RULE
$(BUILD)/$1.flags: $(if $(findstring [$(strip $(FLAGS_$1))],[$(file <$(BUILD)/$1.flags)]),,FORCE)
	@mkdir -p $$(@D); echo '$$(subst ','\'',$$(strip $$(FLAGS_$1)))' >$$@
endef
FLAGS_c := $(CC) $(CFLAGS_ALL) $(LDLIBS)
FLAGS_commit := $(COMMIT)
FLAGS_mpi := $(MPI_FLAGS) $(MPI_LIBS)

# -MMD writes the headers that an object includes. DEFINES: macros, where a source has several objects.
COMPILE_C = $(START)$(CC) $(CFLAGS_ALL) $(DEFINES) -MMD -MP -c $< -o $@
LINK_C = $(START)$(CC) $(CFLAGS_ALL) $(filter %.o,$^) $(LDLIBS) -o $@
$(BUILD)/%.o: %.c $(BUILD)/c.flags ; $(COMPILE_C)
$(BUILD)/%_f32.o: %.c $(BUILD)/c.flags ; $(COMPILE_C)
$(BUILD)/%_mpi.o: %.c $(BUILD)/c.flags $(BUILD)/mpi.flags ; $(COMPILE_C)
$(BUILD)/llmc/comm_mpi.o: private DEFINES := $(MPI_FLAGS)
$(BUILD)/llmc/commit.o: private DEFINES := -DLLMC_COMMIT='"$(COMMIT)"'
$(BUILD)/llmc/commit.o: $(BUILD)/commit.flags
$(CPU_TRAINER): $(addprefix $(BUILD)/,train_gpt_nsa.o fsa/config.o fsa/reference_f32.o llmc/comm.o llmc/commit.o) ; $(LINK_C)
$(MAKERS): $(BUILD)/%: $(BUILD)/data/%.o ; $(LINK_C)

include fsa/fsa.mk dev/cuda/cuda.mk dev/test/test.mk dev/emulator/emulator.mk
$(foreach f,c commit mpi nvcc trainer emulator,$(eval $(call FLAGS_RULE,$f)))
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

# ---- the GPU trainer, and all CUDA code -------------------------------------------------------------
$(OUT)train_gpt_nsa: $(BUILD)/train_gpt_nsa_bf16.o $(BUILD)/llmc/commit.o $(TRAINER_OBJECTS) ; $(LINK_TRAINER)
$(OUT)train_gpt_nsa_fp16 $(OUT)train_gpt_nsa_fp32: $(OUT)%: $(BUILD)/%.o $(BUILD)/llmc/commit.o $(TRAINER_OBJECTS) ; $(LINK_TRAINER)

cuda: $(LIBFSA).a $(LIBFSA).so $(BUILD)/example $(KERNELS) $(LAYERS) $(GPU_TRAINER) $(GPU_TEST_PROGRAMS) $(BUILD)/fp8_gradients
cuda-all:
	@$(MAKE) --no-print-directory cuda BUILD=$(BUILD)/all GPU= ARCHS="80 90" PTX=80
bench: $(if $(USE_GPU),$(KERNELS) $(LAYERS),$(BUILD)/bench_reference)
	@for program in $^; do COMMIT=$(COMMIT) $$program || exit 1; done
