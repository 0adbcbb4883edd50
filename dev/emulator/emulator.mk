# emulator.mk: the CUDA programs on the CPU, for tests on machines without a GPU. translate.sh translates CUDA sources to
# C++ under $(EMU). It needs the headers of the CUDA Toolkit for their types.
EMU := $(BUILD)/emulator
CUDA_RUNTIME_H := $(firstword $(wildcard $(CUDA_HOME)/include/cuda_runtime.h /usr/local/cuda/include/cuda_runtime.h))
CUDA_INCLUDE := $(patsubst %/,%,$(dir $(CUDA_RUNTIME_H)))
EMU_NCCL := $(firstword $(wildcard $(addsuffix /nccl.h,$(CUDA_INCLUDE) /usr/include /usr/local/include)))
# CP_HEAD_GROUP_BYTES=1: models small enough for the emulator still have several head groups with -cp.
EMUFLAGS := -std=gnu++17 -O2 -w -Wno-psabi $(if $(HAS_NATIVE),-march=native) -fopenmp -I$(CUDA_INCLUDE) \
    $(if $(filter 1,$(SAN)),-O1 -g -fsanitize=address) $(if $(EMU_NCCL),-DMULTI_GPU -DCP_HEAD_GROUP_BYTES=1)
FLAGS_emulator := $(CXX) $(EMUFLAGS)

# ---- translated sources ----------------------------------------------------------------------------------------------
# The first compilation of an object waits for all sources. Later ones depend on those that it includes. make does not
# know that a/../b is b, so the rule writes b.
EMU_HEADERS := $(addprefix $(EMU)/,$(wildcard fsa/*.h fsa/*.cuh fsa/sm*/*.cuh llmc/*.h llmc/*.cuh dev/cuda/*.h dev/test/*.h *.h))
EMU_SOURCES := $(addprefix $(EMU)/,$(FSA_SOURCES) $(wildcard dev/*.cu dev/cuda/*.cu dev/test/*.cu *.cu))
$(EMU_HEADERS) $(EMU_SOURCES): $(EMU)/%: % dev/emulator/translate.sh dev/emulator/untranslated.awk
	@dev/emulator/translate.sh $< $@
$(EMU)/fsa/sm80/ptx.cuh $(EMU)/fsa/sm90/ptx.cuh: $(EMU)/fsa/%: dev/emulator/%
$(EMU)/llmc/ptx.cuh: dev/emulator/llmc/ptx.cuh

NO_HEADERS = $(error $@ needs the headers of the CUDA Toolkit, which were not found)
COMPILE_EMU = $(START)$(or $(if $(CUDA_INCLUDE),$(CXX)),$(NO_HEADERS)) $(EMUFLAGS) -MMD -MP
define COMPILE_TRANSLATED
	$(COMPILE_EMU) -include dev/emulator/emulator.h -x c++ -c $< -o $@
	@sed -i -E ':a;s#[^ /]+/\.\./##;ta' $(@:.o=.d)
endef
$(EMU)/%.o: $(EMU)/%.cu $(BUILD)/emulator.flags | $(EMU_HEADERS) $(EMU_SOURCES) ; $(COMPILE_TRANSLATED)
$(EMU)/small/%.o: $(EMU)/%.cu $(BUILD)/emulator.flags | $(EMU_HEADERS) $(EMU_SOURCES) ; $(COMPILE_TRANSLATED)
$(EMU)/%.o: dev/emulator/%.cpp $(BUILD)/emulator.flags
	$(COMPILE_EMU) -c $< -o $@
$(EMU)/fsa/example.o: fsa/example.c $(BUILD)/c.flags
	$(START)$(CC) $(CFLAGS_ALL) -I$(CUDA_INCLUDE) -MMD -MP -c $< -o $@
$(EMU)/test_gpt_nsa.o: $(EMU)/train_gpt_nsa.cu

# ---- programs --------------------------------------------------------------------------------------------------------
EMU_PARTS := $(addprefix $(EMU)/,emulator.o cublaslt.o $(if $(EMU_NCCL),nccl.o))
C_PARTS := $(addprefix $(BUILD)/,llmc/$(if $(MPI),comm_mpi,comm).o fsa/config.o fsa/reference_f32.o)
$(EMU)/fsa.a: $(FSA_SOURCES:%.cu=$(EMU)/%.o) $(EMU_PARTS) $(C_PARTS)
	$(START)rm -f $@ && ar qcs $@ $^
$(EMU)/%.out: $(EMU)/%.o $(EMU)/fsa.a $(BUILD)/mpi.flags
	$(START)$(CXX) $(EMUFLAGS) $(if $(filter 1,$(SAN)),-fsanitize=undefined) $(filter %.o,$^) $(filter %.a,$^) \
	    -lpthread -lrt -Wl,--as-needed $(MPI_LIBS) -o $@
# The kernels' programs link these before fsa.a: with limits so small that small shapes have several head groups, slabs and
# launches. The trainer and test_fsa have the library's limits.
SMALL := $(addprefix $(EMU)/small/fsa/,selected.o sm90/dense_bwd.o)
$(SMALL): private EMUFLAGS += -DFSA_SMALL_LIMITS=1
$(KERNELS:$(BUILD)/%=$(EMU)/dev/cuda/%.out): $(SMALL)
$(EMU)/train_gpt_nsa.out $(EMU)/dev/fp8_gradients.out: $(BUILD)/llmc/commit.o
$(EMU)/test_gpt_nsa.out $(LAYERS:$(BUILD)/%=$(EMU)/dev/cuda/%.out): $(BUILD)/train_gpt_nsa_f32.o
.PRECIOUS: $(EMU)/%.o

EMU_KERNELS := $(patsubst %.cu,%,$(filter-out dev/cuda/core.cu,$(wildcard dev/cuda/*.cu)))
EMU_TESTS := $(patsubst %,$(EMU)/%.out,test_gpt_nsa dev/test/test_fsa dev/test/test_ptx fsa/example \
    $(if $(EMU_NCCL),dev/test/test_nccl) $(EMU_KERNELS))
test-emulator: $(EMU_TESTS) $(EMU)/train_gpt_nsa.out $(TEST_TOOLS)
	@$(RUN) TRAINER=$(EMU)/train_gpt_nsa.out GPUS=$(if $(EMU_NCCL),4,0) bash dev/test/run.sh \
	    "bash dev/test/cli_gpus.sh" "bash dev/test/cli_gpu.sh" $(call commands,$(EMU_TESTS),portable sm90,check small)
