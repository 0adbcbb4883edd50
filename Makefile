# Makefile: builds what this machine can build. `make help` says what it found.
#   CC, CFLAGS and NVCC can be set. SAN=1 builds with the address and undefined-behaviour sanitizers.

# Uses all cores unless -j is given: nvcc takes minutes on one.
ifeq ($(filter -j%,$(MAKEFLAGS)),)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif

CC ?= cc
SAN ?= 0
BUILD := build
ifeq ($(SAN),1)
BUILD := build/san
endif

# ---- what this machine has -----------------------------------------------------------------------------
comma := ,
try = $(shell printf '$(2)\n' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo yes)
HAS_OPENMP := $(call try,-fopenmp,int omp_get_max_threads(void); int main(void){return omp_get_max_threads() < 1;})
HAS_NATIVE := $(call try,-march=native,int main(void){return 0;})
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))

# GPU is the compute capability (90 for 9.0). `make GPU=` ignores the GPU.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')

# With NCCL the GPU trainer runs as several processes; with MPI, mpirun starts them on several hosts. NCCL= and MPI=
# leave them out. SAN=1 leaves out MPI, whose deliberate leaks the sanitizers would report.
CUDA_HOME := $(if $(NVCC),$(abspath $(dir $(realpath $(NVCC)))..),/usr/local/cuda)
NCCL_LIBS := $(patsubst %,-L%,$(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib))
NCCL := $(if $(firstword $(wildcard $(addsuffix /nccl.h,$(CUDA_HOME)/include /usr/include /usr/local/include))),$(call try,-Wl$(comma)--no-as-needed $(NCCL_LIBS) -lnccl,int ncclCommSplit(void); int main(void){return ncclCommSplit();}))
MPI := $(if $(filter 1,$(SAN)),,$(if $(shell command -v mpicc 2>/dev/null),yes))
MPI_FLAGS := $(if $(MPI),-DUSE_MPI $(filter -I%,$(shell mpicc -show 2>/dev/null)))
MPI_LIBS := $(if $(MPI),$(filter -L% -l%,$(shell mpicc -show 2>/dev/null)))

# No -ffast-math: it would break the checks for NaN. -fno-math-errno lets sqrt be one instruction.
CFLAGS ?= -O3
CFLAGS_ALL := -std=gnu11 -Wall -Wextra -fno-math-errno $(CFLAGS)
CFLAGS_ALL += $(if $(HAS_NATIVE),-march=native) $(if $(HAS_OPENMP),-fopenmp,-Wno-unknown-pragmas)
ifeq ($(SAN),1)
CFLAGS_ALL += -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
endif
LDLIBS := -lm -lpthread

HEADERS := $(wildcard fsa/*.h llmc/*.h dev/test/*.h) train_gpt_nsa.h
# Programs of several processes link COMM and MPI_LIBS; programs of one process link comm.o, which needs no MPI.
COMM := $(BUILD)/$(if $(MPI),comm_mpi,comm).o
REFERENCE := $(BUILD)/config.o $(BUILD)/reference_f32.o $(BUILD)/reference_f64.o
CPU := $(if $(filter 1,$(SAN)),$(BUILD)/train_gpt_nsa_cpu,train_gpt_nsa_cpu)
PRECISION := bf16
FLOATX := $(if $(filter fp16,$(PRECISION)),-DENABLE_FP16,$(if $(filter fp32,$(PRECISION)),-DENABLE_FP32,$(if $(filter bf16,$(PRECISION)),,$(error PRECISION=$(PRECISION): must be bf16, fp16 or fp32))))
GPU_TRAINER := train_gpt_nsa$(if $(FLOATX),_$(PRECISION))
MAKERS := $(BUILD)/recall $(BUILD)/text
LAYERS := $(addprefix build/,adamw classifier embedding global_norm matmul rmsnorm swiglu)
KERNELS := $(filter-out $(LAYERS),$(patsubst dev/cuda/%.cu,build/%,$(wildcard dev/cuda/*.cu)))
TESTS := $(addprefix $(BUILD)/,test_reference test_golden test_model test_model_golden test_data test_run test_comm test_parallel)

.PHONY: all train test bench cuda sanitize clean help data faults
all: $(CPU) $(MAKERS) $(if $(and $(NVCC),$(GPU)),$(GPU_TRAINER))

help:
	@echo "make train     build, make the recall data, train on it; ARGS='-flag value ...' adds flags,"
	@echo "               GPU= trains on the CPU, PRECISION=fp16 or fp32 builds the GPU trainer for these"
	@echo "make test      build and run all tests; SAN=1: with address and undefined-behaviour sanitizers"
	@echo "make bench     time the kernels of this machine"
	@echo "make cuda      compile all CUDA code for all architectures (needs nvcc, no GPU)"
	@echo "make sanitize  compute-sanitizer over the GPU library's tests (needs a GPU)"
	@echo "make faults    plant faults in the reference, one at a time, and check that a test fails for each"
	@echo "make clean     remove what was built; data and checkpoints stay"
	@echo "found: $(CC); OpenMP: $(or $(HAS_OPENMP),no); -march=native: $(or $(HAS_NATIVE),no); nvcc: $(or $(NVCC),no); GPU: $(if $(GPU),sm_$(GPU),none); NCCL: $(or $(NCCL),no); MPI: $(or $(MPI),no)"

# ---- the C programs ----------------------------------------------------------------------------
$(BUILD):
	@mkdir -p $@
$(BUILD)/config.o: fsa/config.c fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -c $< -o $@
$(BUILD)/reference_f32.o: fsa/reference.c fsa/reference.h fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -c $< -o $@
$(BUILD)/reference_f64.o: fsa/reference.c fsa/reference.h fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -DFSA_REF_DOUBLE -c $< -o $@
$(BUILD)/comm.o $(BUILD)/comm_mpi.o: llmc/comm.c llmc/comm.h llmc/utils.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) $(if $(findstring mpi,$(@F)),$(MPI_FLAGS)) -c $< -o $@
$(CPU): train_gpt_nsa.c $(REFERENCE) $(BUILD)/comm.o $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(BUILD)/reference_f32.o $(BUILD)/comm.o $(LDLIBS) -o $@
$(BUILD)/recall $(BUILD)/text: $(BUILD)/%: data/%.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) $< $(LDLIBS) -o $@
$(BUILD)/bench_reference: dev/bench_reference.c $(REFERENCE) $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(REFERENCE) $(LDLIBS) -o $@

COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null)

# ---- train -------------------------------------------------------------------------------------
# The default task: recall facts from up to 256 tokens ago on the CPU, 1,024 on a GPU. A second run resumes from
# the newest checkpoint; once all steps are done, it says so and shows the result.
PROMPT := "Remember Mara : lamp . Remember Ruth : key . Recall Mara :"
ifneq ($(and $(NVCC),$(GPU)),)
TRAINER := $(GPU_TRAINER)
TASK := recall1k
TASK_DATA := -t 1024 -n 24000
TASK_FLAGS := -e recall-1k -b 16 -x 1500 -l 1e-3 -u 150 -q 0 -beta2 0.98 -v 500 -m 0 -n 500 -s 500 -g 16
else
TRAINER := $(CPU)
TASK := recall
TASK_FLAGS := -e recall -b 2 -x 1200 -l 2e-3 -u 150 -q 0 -beta2 0.98 -v 300 -m 0 -n 300 -s 600 -g 16
endif
RECALL := -i 'data/$(TASK)/recall_train_*.bin' -j 'data/$(TASK)/recall_val_*.bin' -o log/$(TASK) -y 1 -prompt $(PROMPT)

data: $(MAKERS)
	@$(BUILD)/recall -o data/$(TASK) $(TASK_DATA)

train: $(TRAINER) data
	@$(if $(GPU),$(if $(NVCC),,echo "note: there is a GPU but no nvcc; with the CUDA Toolkit make train would use the GPU"))
	@./$(TRAINER) $(TASK_FLAGS) $(RECALL) $(ARGS)
	@echo
	@echo "Next:"
	@echo "  sample:             ./$(TRAINER) -e \$$(ls log/$(TASK)/ckpt_*.bin | tail -1) -sample 1 -temp 0 -g 24 -prompt 'Remember Mara : lamp . Remember Ruth : key . Recall Mara :'"
	@echo "  go on training:     make train ARGS='-x 2000'"
	@echo "  train on your text: $(BUILD)/text -o data/mytext -name mytext README.md fsa llmc && ./$(TRAINER) -e $(if $(filter recall,$(TASK)),tiny,shakespeare) -i 'data/mytext/mytext_train_*.bin' -j 'data/mytext/mytext_val_*.bin' -o log/mytext -y 1 -t 256 -x 100 -v 50 -s 100"

# ---- test --------------------------------------------------------------------------------------
$(BUILD)/test_reference $(BUILD)/test_golden: $(BUILD)/test_%: dev/test/test_%.c $(REFERENCE) $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(REFERENCE) $(LDLIBS) -o $@
$(BUILD)/train_gpt_nsa_f64.o: train_gpt_nsa.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) -DGPT_NO_MAIN -DGPT_DOUBLE -c $< -o $@
$(BUILD)/test_model $(BUILD)/test_model_golden: $(BUILD)/test_%: dev/test/test_%.c $(BUILD)/train_gpt_nsa_f64.o $(REFERENCE) $(HEADERS)
	$(CC) $(CFLAGS_ALL) -DGPT_DOUBLE $< $(BUILD)/train_gpt_nsa_f64.o $(REFERENCE) $(LDLIBS) -o $@
$(BUILD)/test_data: dev/test/test_data.c data/recall.c data/text.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) $< $(LDLIBS) -o $@
$(BUILD)/test_run: dev/test/test_run.c $(BUILD)/config.o $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(LDLIBS) -o $@

$(BUILD)/test_comm: dev/test/test_comm.c llmc/comm.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) $(MPI_FLAGS) $< $(MPI_LIBS) -lpthread -o $@
$(BUILD)/test_parallel: dev/test/test_parallel.c $(BUILD)/config.o $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(LDLIBS) -o $@
$(BUILD)/encode: dev/test/encode.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) $< $(LDLIBS) -o $@

# With a GPU: the library and every kernel's own program against the C reference; the GPU trainer's model in its
# three precisions against the C trainer's.
GPU_MODEL_TESTS := $(addprefix build/test_gpt_nsa_,bf16 fp16 fp32)
GPU_TESTS := $(if $(and $(NVCC),$(GPU)),build/test_ptx build/test_fsa build/example $(filter-out build/core,$(KERNELS)) $(LAYERS) $(GPU_MODEL_TESTS) $(if $(NCCL),build/test_nccl))
# The GPU trainer that cli_gpu.sh runs: this GPU's, or the emulator's if there is none.
GPU_CLI = $(if $(GPU_TESTS),$(GPU_TRAINER),$(if $(EMU_TESTS),$(EMU)/train_gpt_nsa.out))
# The number of processes that cli_gpus.sh may start, one a GPU.
GPUS = $(if $(EMU_TESTS),$(if $(EMU_NCCL),4,0),$(if $(NCCL),$(shell nvidia-smi -L 2>/dev/null | wc -l),0))
# Every CUDA test, at small sizes on the emulator. Programs whose step has kernels for Hopper run once with each kind.
KINDS = portable$(if $(filter 90,$(GPU))$(EMU_TESTS), sm90)
FLAGS = check $(if $(EMU_TESTS),small,$(if $(filter test_fsa,$1),large))
CUDA_TESTS = $(foreach t,$(GPU_TESTS) $(EMU_TESTS),$(call cuda_test,$(t),$(notdir $(basename $(t)))))
cuda_test = $(if $(filter test_fsa dense_forward dense_backward selected,$2),$(foreach k,$(KINDS),"env FSA_KERNELS=$(k) $1 $(call FLAGS,$2)"),"$1 $(call FLAGS,$2)")
NO_CUDA := CUDA tests, which need a GPU or the CUDA Toolkit: 0 passed, 0 failed, 1 skipped
test: $(TESTS) $(BUILD)/encode $(CPU) $(MAKERS) $(GPU_TESTS) $(if $(GPU_TESTS),$(GPU_TRAINER))
	@CPU=./$(CPU) BUILD=$(BUILD) TRAINER=./$(GPU_CLI) GPUS=$(GPUS) MPI=$(MPI) bash dev/test/run.sh $(TESTS) \
	    $(or $(CUDA_TESTS),"echo $(NO_CUDA)") \
	    $(if $(GPU_CLI),"bash dev/test/cli_gpu.sh" "bash dev/test/cli_gpus.sh")

faults:
	@bash dev/test/faults.sh

bench: $(if $(and $(NVCC),$(GPU)),$(KERNELS) $(LAYERS),$(BUILD)/bench_reference)
	@for program in $^; do COMMIT=$(COMMIT) $$program || exit 1; done

# ---- CUDA --------------------------------------------------------------------------------------
# libfsa, its programs and its tests are built for this machine's GPU. Without one, they are built for all that
# they support: sm_80, sm_90, and PTX for later GPUs.
ifneq ($(GPU),)
GENCODE := -gencode arch=compute_$(GPU),code=sm_$(GPU)
else
GENCODE := $(foreach a,80 90,-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
endif
# wgmma, TMA with setmaxnreg and the like exist for sm_90a only.
SM90A := -gencode arch=compute_90a,code=sm_90a
build/fsa/sm90/%.o build/racecheck/%.o build/test_ptx: GENCODE = $(SM90A)
NVCCFLAGS = -O3 -std=c++17 $(GENCODE) -Xcompiler -fPIC -Xcompiler -fvisibility=hidden
FSA_SOURCES := $(wildcard fsa/*.cu fsa/sm80/*.cu fsa/sm90/*.cu)
FSA_HEADERS := $(wildcard fsa/*.h fsa/*.cuh fsa/sm80/*.cuh fsa/sm90/*.cuh)
FSA := $(patsubst fsa/%.cu,build/fsa/%.o,$(FSA_SOURCES)) build/fsa/config.o
CUDA_HEADERS := $(FSA_HEADERS) $(wildcard dev/cuda/*.h dev/test/test.h)

build/fsa/%.o: fsa/%.cu $(FSA_HEADERS)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -c $< -o $@
build/fsa/config.o: fsa/config.c fsa/fsa.h
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 -fPIC -fvisibility=hidden -c $< -o $@
# ar q: objects of sm80/ and sm90/ have the same file names.
libfsa.a: $(FSA)
	rm -f $@ && ar qcs $@ $^
libfsa.so.0: $(FSA)
	$(NVCC) $(GENCODE) -shared -Xlinker -soname=$@ $^ -o $@
	@! nm -D --defined-only $@ | grep -v ' T fsa_' || { echo "error: $@ exports these symbols, which fsa.h does not declare" >&2; rm $@; exit 1; }
libfsa.so: libfsa.so.0
	ln -sf $< $@
# A program links the library's kernel that it times, or includes its source.
$(KERNELS): build/%: dev/cuda/%.cu libfsa.a $(CUDA_HEADERS) $(FSA_SOURCES) $(BUILD)/reference_f32.o
	$(NVCC) $(NVCCFLAGS) $< $(BUILD)/reference_f32.o libfsa.a $(if $(HAS_OPENMP),-lgomp) -o $@
build/test_ptx build/test_fsa: build/%: dev/test/%.cu libfsa.a $(CUDA_HEADERS) $(BUILD)/reference_f32.o
	$(NVCC) $(NVCCFLAGS) $< $(BUILD)/reference_f32.o libfsa.a $(if $(HAS_OPENMP),-lgomp) -o $@

build/example: fsa/example.c libfsa.a
	$(NVCC) $(GENCODE) $^ -o $@

cuda: libfsa.a libfsa.so build/example $(KERNELS) $(LAYERS) build/test_ptx build/test_fsa $(GPU_TRAINER) $(GPU_MODEL_TESTS) $(if $(NCCL),build/test_nccl)

# compute-sanitizer over the library's test and the layers' checks at few shapes; needs a GPU. racecheck needs its
# own build (FSA_RACECHECK in fsa/sm90/ptx.cuh).
SANITIZED := $(filter-out build/matmul,$(LAYERS))
sanitize: build/test_fsa build/test_fsa_racecheck $(SANITIZED)
	for tool in memcheck racecheck initcheck; do \
	    for kernels in $(KINDS); do \
	        test=build/test_fsa; [ $$tool = racecheck ] && test=build/test_fsa_racecheck; \
	        FSA_KERNELS=$$kernels compute-sanitizer --tool $$tool --error-exitcode 1 $$test small || exit 1; done; \
	    for layer in $(SANITIZED); do \
	        compute-sanitizer --tool $$tool --error-exitcode 1 $$layer check small || exit 1; done; done
build/racecheck/%.o: fsa/sm90/%.cu $(FSA_HEADERS)
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -DFSA_RACECHECK -c $< -o $@
build/test_fsa_racecheck: dev/test/test_fsa.cu $(patsubst fsa/sm90/%.cu,build/racecheck/%.o,$(wildcard fsa/sm90/*.cu)) libfsa.a $(CUDA_HEADERS) $(BUILD)/reference_f32.o
	$(NVCC) $(NVCCFLAGS) $(filter %.cu %.o,$^) libfsa.a $(if $(HAS_OPENMP),-lgomp) -o $@

# ---- the GPU trainer and its test --------------------------------------------------------------
TRAINER_HEADERS := $(FSA_HEADERS) $(wildcard llmc/*.h llmc/*.cuh dev/test/*.h) train_gpt_nsa.h
TRAINER_FLAGS := $(NVCCFLAGS) $(if $(HAS_OPENMP),-Xcompiler -fopenmp) $(if $(NCCL),-DMULTI_GPU)
TRAINER_LIBS := $(if $(NCCL),$(COMM),$(BUILD)/comm.o) libfsa.a -lcublasLt $(if $(HAS_OPENMP),-lgomp) $(if $(NCCL),$(NCCL_LIBS) -lnccl $(MPI_LIBS) $(addprefix -Xlinker -rpath=,$(patsubst -L%,%,$(NCCL_LIBS) $(filter -L%,$(MPI_LIBS)))))
$(GPU_TRAINER): train_gpt_nsa.cu $(filter %.o %.a,$(TRAINER_LIBS)) $(TRAINER_HEADERS)
	$(NVCC) $(TRAINER_FLAGS) $(FLOATX) $< $(TRAINER_LIBS) -o $@
$(BUILD)/train_gpt_nsa_f32.o: train_gpt_nsa.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) -DGPT_NO_MAIN -c $< -o $@
build/test_gpt_nsa_bf16 build/test_gpt_nsa_fp16 build/test_gpt_nsa_fp32: build/test_gpt_nsa_%: test_gpt_nsa.cu train_gpt_nsa.cu $(filter %.o %.a,$(TRAINER_LIBS)) $(TRAINER_HEADERS) $(BUILD)/train_gpt_nsa_f32.o $(BUILD)/reference_f32.o
	$(NVCC) $(TRAINER_FLAGS) $(if $(filter fp%,$*),-DENABLE_$(subst f,F,$(subst p,P,$*))) $< $(BUILD)/train_gpt_nsa_f32.o $(BUILD)/reference_f32.o $(TRAINER_LIBS) -o $@

build/test_nccl: dev/test/test_nccl.cu $(TRAINER_HEADERS) build/fsa/config.o $(BUILD)/comm.o
	$(NVCC) $(NVCCFLAGS) -DMULTI_GPU $< build/fsa/config.o $(BUILD)/comm.o $(NCCL_LIBS) -lnccl $(addprefix -Xlinker -rpath=,$(patsubst -L%,%,$(NCCL_LIBS))) -o $@

# One program for each layer of llmc, which compares it with the C trainer's.
$(LAYERS): build/%: dev/cuda/%.cu $(TRAINER_HEADERS) $(wildcard dev/cuda/*.h) $(BUILD)/train_gpt_nsa_f32.o $(BUILD)/reference_f32.o $(BUILD)/config.o
	$(NVCC) $(NVCCFLAGS) $< $(filter %.o,$^) -lcublasLt $(if $(HAS_OPENMP),-lgomp) -o $@

# ---- the emulator ------------------------------------------------------------------------------
# Without a GPU, dev/emulator runs the kernels on the CPU, for tests only: CUDA sources translated to C++ under
# build/emulator. It needs the toolkit's headers for their types.
EMU := $(BUILD)/emulator
CUDA_INCLUDE := $(firstword $(wildcard $(if $(NVCC),$(dir $(realpath $(NVCC)))../include/cuda_runtime.h) /usr/local/cuda/include/cuda_runtime.h))
EMUFLAGS := -std=gnu++17 -O3 -w -Wno-psabi $(if $(HAS_NATIVE),-march=native) -fopenmp -I$(dir $(CUDA_INCLUDE))
ifeq ($(SAN),1)
EMUFLAGS += -O1 -g -fsanitize=address
endif
EMU_NCCL := $(firstword $(wildcard $(dir $(CUDA_INCLUDE))nccl.h /usr/include/nccl.h /usr/local/include/nccl.h))
# CP_HEAD_GROUP_BYTES=1: models small enough for the emulator still have several head groups with -cp.
EMUFLAGS += $(if $(EMU_NCCL),-DMULTI_GPU -DCP_HEAD_GROUP_BYTES=1)
EMU_FSA_HEADERS := $(patsubst %,$(EMU)/%,$(FSA_HEADERS)) dev/emulator/emulator.h
EMU_HEADERS := $(EMU_FSA_HEADERS) $(patsubst %,$(EMU)/%,$(wildcard llmc/*.h llmc/*.cuh dev/cuda/*.h dev/test/*.h train_gpt_nsa.h))
EMU_FSA := $(patsubst fsa/%.cu,$(EMU)/fsa/%.o,$(FSA_SOURCES)) $(EMU)/emulator.o $(EMU)/cublaslt.o $(if $(EMU_NCCL),$(EMU)/nccl.o) $(COMM) $(BUILD)/config.o $(BUILD)/reference_f32.o

$(EMU)/%: % dev/emulator/translate.sh $(wildcard dev/emulator/sm*/*.cuh)
	@dev/emulator/translate.sh $< $@
$(EMU)/emulator.o $(EMU)/cublaslt.o $(EMU)/nccl.o: $(EMU)/%.o: dev/emulator/%.cpp dev/emulator/emulator.h $(wildcard dev/emulator/sm*/*.cuh)
	@mkdir -p $(EMU)
	$(CXX) $(EMUFLAGS) -c $< -o $@
$(EMU)/fsa/%.o: $(EMU)/fsa/%.cu $(EMU_FSA_HEADERS)
	$(CXX) $(EMUFLAGS) -include dev/emulator/emulator.h -x c++ -c $< -o $@
$(EMU)/%.o: $(EMU)/%.cu $(EMU_HEADERS)
	$(CXX) $(EMUFLAGS) -include dev/emulator/emulator.h -x c++ -c $< -o $@
$(EMU)/fsa/example.o: fsa/example.c fsa/fsa.h
	@mkdir -p $(EMU)/fsa
	$(CC) $(CFLAGS_ALL) -I$(dir $(CUDA_INCLUDE)) -c $< -o $@
$(EMU)/fsa.a: $(EMU_FSA)
	rm -f $@ && ar qcs $@ $^
$(EMU)/%.out: $(EMU)/%.o $(EMU)/fsa.a
	$(CXX) $(EMUFLAGS) $(if $(filter 1,$(SAN)),-fsanitize=undefined) $(filter %.o,$^) $(filter %.a,$^) -lpthread -lrt -Wl,--as-needed $(MPI_LIBS) -o $@
$(EMU)/test_gpt_nsa.o: $(EMU)/train_gpt_nsa.cu
$(EMU)/test_gpt_nsa.out $(LAYERS:build/%=$(EMU)/dev/cuda/%.out): $(BUILD)/train_gpt_nsa_f32.o
EMU_TESTS := $(if $(GPU_TESTS),,$(if $(CUDA_INCLUDE),$(patsubst %,$(EMU)/%.out,dev/test/test_ptx dev/test/test_fsa fsa/example $(if $(EMU_NCCL),dev/test/test_nccl) \
    $(patsubst %.cu,%,$(filter-out dev/cuda/core.cu,$(wildcard dev/cuda/*.cu))) test_gpt_nsa)))
test: $(EMU_TESTS) $(if $(EMU_TESTS),$(EMU)/train_gpt_nsa.out)
.PRECIOUS: $(EMU)/% $(EMU)/%.o

clean:
	rm -rf build train_gpt_nsa_cpu train_gpt_nsa train_gpt_nsa_fp16 train_gpt_nsa_fp32 libfsa.a libfsa.so libfsa.so.0
