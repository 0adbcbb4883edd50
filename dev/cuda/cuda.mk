# cuda.mk: how CUDA code is compiled and linked, a program for each kernel, and the GPU trainer.

# Code for this machine's GPU; without one, for all that libfsa is tuned for. PTX is for later GPUs (make cuda-all).
ARCHS := $(or $(GPU),80 90a)
GENCODE := $(foreach a,$(ARCHS),-gencode arch=compute_$a,code=sm_$a) $(foreach a,$(PTX),-gencode arch=compute_$a,code=compute_$a)
# wgmma, TMA with setmaxnreg and the like exist for sm_90a only.
SM90A := -gencode arch=compute_90a,code=sm_90a
$(BUILD)/fsa/sm90/%.o $(BUILD)/racecheck/%.o $(BUILD)/dev/test/test_ptx.o: private GENCODE := $(SM90A)

NVCCFLAGS := -O3 -std=c++17 -Xcompiler -fPIC -Xcompiler -fvisibility=hidden
NO_NVCC = $(error $@ needs nvcc, which was not found: install the CUDA Toolkit or set NVCC=)
COMPILE_CUDA = $(START)$(or $(NVCC),$(NO_NVCC)) $(NVCCFLAGS) $(GENCODE) $(DEFINES) -MMD -MP -MF $(@:.o=.d) -MT $@ -c $< -o $@
LINK_CUDA = $(START)$(NVCC) $(GENCODE) $(filter %.o,$^) $(filter %.a,$^) $(if $(HAS_OPENMP),-lgomp) -o $@
FLAGS_nvcc := $(NVCC) $(NVCCFLAGS) $(GENCODE)
$(BUILD)/%.o: %.cu $(BUILD)/nvcc.flags ; $(COMPILE_CUDA)

# ---- programs: a kernel of libfsa, or a layer of llmc, against the C reference --------------------------------------
LAYERS := $(addprefix $(BUILD)/,adamw classifier embedding fp8 fp8_matmul global_norm matmul rmsnorm swiglu)
KERNELS := $(filter-out $(LAYERS),$(patsubst dev/cuda/%.cu,$(BUILD)/%,$(wildcard dev/cuda/*.cu)))
$(KERNELS): $(BUILD)/%: $(BUILD)/dev/cuda/%.o $(BUILD)/fsa/reference_f32.o $(LIBFSA).a ; $(LINK_CUDA)
C_MODEL := $(addprefix $(BUILD)/,train_gpt_nsa_f32.o fsa/reference_f32.o fsa/config.o)
$(LAYERS): $(BUILD)/%: $(BUILD)/dev/cuda/%.o $(C_MODEL) ; $(LINK_CUDA) -lcublasLt
$(BUILD)/train_gpt_nsa_f32.o: private DEFINES := -DGPT_NO_MAIN

# ---- the GPU trainer, in its three precisions ------------------------------------------------------------------------
TRAINER_FLAGS := $(if $(HAS_OPENMP),-Xcompiler -fopenmp) $(if $(NCCL),-DMULTI_GPU)
# Programs of several processes link MPI; programs of one process link comm.o, which needs no MPI.
TRAINER_OBJECTS := $(BUILD)/llmc/$(if $(and $(NCCL),$(MPI)),comm_mpi,comm).o $(LIBFSA).a $(BUILD)/mpi.flags
NCCL_LINK := $(NCCL_LIBS) -lnccl $(patsubst -L%,-Xlinker -rpath=%,$(NCCL_LIBS))
MPI_LINK := $(MPI_LIBS) $(patsubst -L%,-Xlinker -rpath=%,$(filter -L%,$(MPI_LIBS)))
LINK_TRAINER = $(LINK_CUDA) -lcublasLt $(if $(NCCL),$(NCCL_LINK) $(MPI_LINK))
FLAGS_trainer := $(FLAGS_nvcc) $(TRAINER_FLAGS)
$(BUILD)/%_bf16.o: %.cu $(BUILD)/trainer.flags ; $(COMPILE_CUDA)
$(BUILD)/%_fp16.o: %.cu $(BUILD)/trainer.flags ; $(COMPILE_CUDA)
$(BUILD)/%_fp32.o: %.cu $(BUILD)/trainer.flags ; $(COMPILE_CUDA)
$(BUILD)/%_bf16.o: private DEFINES := $(TRAINER_FLAGS)
$(BUILD)/%_fp16.o: private DEFINES := $(TRAINER_FLAGS) -DENABLE_FP16
$(BUILD)/%_fp32.o: private DEFINES := $(TRAINER_FLAGS) -DENABLE_FP32

# The gradients of -matmul fp8 against those of 16-bit matmuls, for a model and its data.
$(BUILD)/fp8_gradients: $(BUILD)/dev/fp8_gradients_bf16.o $(BUILD)/llmc/commit.o $(TRAINER_OBJECTS) ; $(LINK_TRAINER)

# ---- other people's kernels beside ours --------------------------------------------------------------------------------
peers: $(if $(GPU),$(LIBFSA).so) # without a GPU run.py says so, and no build is needed
	@LIBFSA=$(abspath $(LIBFSA).so) COMMIT=$(COMMIT) python3 dev/peers/run.py $(ARGS)
