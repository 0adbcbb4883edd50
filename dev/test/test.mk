# test.mk: the test programs, and which of them run where. dev/test/run.sh runs them, LANES at a time.

# ---- the C programs --------------------------------------------------------------------------------------------------
REFERENCE := $(addprefix $(BUILD)/fsa/,config.o reference_f32.o reference_f64.o)
$(BUILD)/%_f64.o: %.c $(BUILD)/c.flags ; $(COMPILE_C)
$(BUILD)/fsa/reference_f64.o: private DEFINES := -DFSA_REF_DOUBLE
$(BUILD)/train_gpt_nsa_f64.o: private DEFINES := -DGPT_NO_MAIN -DGPT_DOUBLE
$(BUILD)/dev/test/test_model.o $(BUILD)/dev/test/test_model_golden.o: private DEFINES := -DGPT_DOUBLE
$(BUILD)/dev/test/test_comm_mpi.o: private DEFINES := $(MPI_FLAGS)

CPU_TESTS := $(addprefix $(BUILD)/,test_comm test_reference test_model test_run test_data test_golden \
    test_model_golden test_parallel)
TEST_TOOLS := $(BUILD)/encode $(BUILD)/logits $(BUILD)/adamw_step $(CPU_TRAINER) $(MAKERS)
$(BUILD)/test_reference $(BUILD)/test_golden $(BUILD)/bench_reference: $(REFERENCE)
$(BUILD)/test_model $(BUILD)/test_model_golden: $(BUILD)/train_gpt_nsa_f64.o $(REFERENCE)
$(BUILD)/test_run $(BUILD)/test_parallel $(BUILD)/adamw_step: $(BUILD)/fsa/config.o
$(BUILD)/test_run: $(BUILD)/llmc/commit.o
$(BUILD)/logits: $(addprefix $(BUILD)/,train_gpt_nsa_f32.o fsa/config.o fsa/reference_f32.o)
$(BUILD)/fuzz_files: $(addprefix $(BUILD)/,fsa/config.o llmc/comm.o llmc/commit.o)
# test_run counts the calls of fsync and rename.
$(BUILD)/test_run: private LDLIBS += -Wl,--wrap=fsync,--wrap=rename
$(filter-out %test_comm,$(CPU_TESTS)) $(BUILD)/encode $(BUILD)/logits $(BUILD)/adamw_step $(BUILD)/fuzz_files: $(BUILD)/%: $(BUILD)/dev/test/%.o ; $(LINK_C)
$(BUILD)/test_comm: $(BUILD)/dev/test/test_comm_mpi.o $(BUILD)/mpi.flags ; $(LINK_C) $(MPI_LIBS)
$(BUILD)/bench_reference: $(BUILD)/dev/bench_reference.o ; $(LINK_C)

# ---- the CUDA programs: they run on a GPU, and on the emulator (dev/emulator/emulator.mk) -----------------------------
# libfsa, the PTX instructions, NCCL, and the GPU trainer's model in its three precisions against the C trainer's.
GPU_MODEL_TESTS := $(addprefix $(BUILD)/,test_gpt_nsa_bf16 test_gpt_nsa_fp16 test_gpt_nsa_fp32)
GPU_TEST_PROGRAMS := $(GPU_MODEL_TESTS) $(addprefix $(BUILD)/,test_ptx test_fsa $(if $(NCCL),test_nccl))
$(BUILD)/test_ptx $(BUILD)/test_fsa: $(BUILD)/%: $(BUILD)/dev/test/%.o $(BUILD)/fsa/reference_f32.o $(LIBFSA).a ; $(LINK_CUDA)
$(GPU_MODEL_TESTS): $(BUILD)/train_gpt_nsa_f32.o $(BUILD)/fsa/reference_f32.o
$(GPU_MODEL_TESTS): $(BUILD)/%: $(BUILD)/%.o $(TRAINER_OBJECTS) ; $(LINK_TRAINER)
$(BUILD)/dev/test/test_nccl.o: private DEFINES := -DMULTI_GPU
$(BUILD)/test_nccl: $(BUILD)/dev/test/test_nccl.o $(BUILD)/fsa/config.o $(BUILD)/llmc/comm.o ; $(LINK_CUDA) $(NCCL_LINK)

# $(call commands,PROGRAMS,KINDS,FLAGS): the commands that run these CUDA programs. Programs whose step has kernels for
# Hopper run once with each kind. The longest come first, so that no lane ends much later than the others.
LONGEST := test_fsa test_gpt_nsa $(notdir $(GPU_MODEL_TESTS)) dense_backward selected dense_forward topk compress
KIND_TESTS := test_fsa dense_forward dense_backward selected
longest_first = $(foreach n,$(LONGEST),$(filter %/$n %/$n.out,$1)) $(filter-out $(foreach n,$(LONGEST),%/$n %/$n.out),$1)
has_kinds = $(filter $(KIND_TESTS),$(notdir $(basename $1)))
commands = $(foreach p,$(call longest_first,$1),$(if $(call has_kinds,$p),$(foreach k,$2,"env FSA_KERNELS=$k $p $3"),"$p $3"))
GPU_KINDS := portable $(if $(filter 90,$(GPU)),sm90)
GPU_TESTS := $(if $(USE_GPU),$(BUILD)/example $(filter-out %/core,$(KERNELS)) $(LAYERS) $(GPU_TEST_PROGRAMS))

# ---- goals -----------------------------------------------------------------------------------------------------------
# Tests run LANES at a time: 2 on two cores, 4 on 16. Much of the time of a CUDA test is the C reference's.
CORES := $(shell nproc 2>/dev/null || echo 1)
LANES := $(shell echo $$(($(CORES) > 12 ? $(CORES) / 4 : $(CORES) > 2 ? 3 : 2)))
RUN = COMMIT="$(COMMIT)" CPU=$(CPU_TRAINER) BUILD=$(BUILD) MPI=$(MPI) LANES=$(LANES) CORES=$(CORES)
# The longest come first. test_peers waits for much of its time.
PYTHON_TESTS := $(if $(shell command -v python3),"python3 dev/test/test_hf.py" "python3 dev/test/test_peers.py" \
    "python3 dev/test/test_bpe.py" "python3 dev/test/test_plots.py" "python3 dev/test/test_torch.py check" \
    "python3 dev/test/test_evals.py" "python3 dev/test/test_separate_kv.py" "python3 dev/test/test_performance.py" \
    "python3 dev/test/test_compare_sass.py",\
    "echo Python tests need python3: 0 passed, 0 failed, 1 skipped")
SCRIPTS := $(PYTHON_TESTS) "bash dev/test/cli.sh" "bash dev/test/headers.sh" "bash dev/test/translate.sh" \
    "bash dev/test/install.sh" "bash dev/test/wheel.sh"
GPUS = $(if $(NCCL),$(shell bash -c '. scripts/common.sh; all_gpus'),0)
test: $(CPU_TESTS) $(TEST_TOOLS) $(GPU_TESTS) $(if $(USE_GPU),$(GPU_TRAINER) $(LIBFSA).so)
	@$(if $(USE_GPU),,echo "No $(if $(GPU),nvcc,GPU): CUDA kernels are not tested. make test-emulator tests them on the CPU.")
	@$(RUN) TRAINER=$(GPU_TRAINER) GPUS=$(GPUS) bash dev/test/run.sh \
	    $(if $(USE_GPU),$(call commands,$(GPU_TESTS),$(GPU_KINDS),check) "bash dev/test/cli_gpu.sh" "bash dev/test/cli_gpus.sh") \
	    "$(BUILD)/test_comm" $(SCRIPTS) $(patsubst %,"%",$(filter-out %/test_comm,$(CPU_TESTS)))

# The library at 300,000 and 1,000,000 tokens.
test-large: $(if $(USE_GPU),$(BUILD)/test_fsa)
	@$(if $(USE_GPU),,echo "error: make test-large needs a GPU and nvcc" >&2; exit 1)
	@$(RUN) LANES=1 bash dev/test/run.sh $(foreach k,$(GPU_KINDS),"env FSA_KERNELS=$k $(BUILD)/test_fsa large")

# Plants faults in a copy of the sources, and checks that a test fails for each.
faults:
	@bash dev/test/faults.sh cpu
faults-emulator:
	@bash dev/test/faults.sh emulator

# compute-sanitizer over the library's test and the layers' checks at few shapes. racecheck needs its own build
# (FSA_RACECHECK in fsa/sm90/ptx.cuh).
SANITIZED := $(filter-out %matmul,$(LAYERS))
sanitize: $(if $(USE_GPU),$(BUILD)/test_fsa $(BUILD)/test_fsa_racecheck $(SANITIZED))
	@$(if $(USE_GPU),,echo "error: make sanitize needs a GPU and nvcc" >&2; exit 1)
	for tool in memcheck racecheck initcheck; do \
	    for kernels in $(GPU_KINDS); do \
	        test=$(BUILD)/test_fsa; [ $$tool = racecheck ] && test=$(BUILD)/test_fsa_racecheck; \
	        FSA_KERNELS=$$kernels compute-sanitizer --tool $$tool --error-exitcode 1 $$test small || exit 1; done; \
	    for layer in $(SANITIZED); do \
	        compute-sanitizer --tool $$tool --error-exitcode 1 $$layer check small || exit 1; done; done
$(BUILD)/racecheck/%.o: fsa/sm90/%.cu $(BUILD)/nvcc.flags ; $(COMPILE_CUDA)
$(BUILD)/racecheck/%.o: private DEFINES := -DFSA_RACECHECK
RACECHECK := $(patsubst fsa/sm90/%.cu,$(BUILD)/racecheck/%.o,$(wildcard fsa/sm90/*.cu))
$(BUILD)/test_fsa_racecheck: $(BUILD)/dev/test/test_fsa.o $(RACECHECK) $(BUILD)/fsa/reference_f32.o $(LIBFSA).a ; $(LINK_CUDA)

# Mutated files, random flags, kills, and hostile peers: each program runs for SECONDS. COUNT=20000 sets a least number
# of files, flags or kills. SAN=1 builds with the sanitizers.
SECONDS ?= 5
fuzz: $(BUILD)/fuzz_files $(BUILD)/test_comm $(CPU_TRAINER) $(MAKERS)
	SECONDS=$(SECONDS) $(BUILD)/fuzz_files
	SECONDS=$(SECONDS) python3 dev/test/fuzz_flags.py ./$(CPU_TRAINER) $(BUILD)/recall
	SECONDS=$(SECONDS) python3 dev/test/fuzz_kills.py ./$(CPU_TRAINER) $(BUILD)/recall
	SECONDS=$(SECONDS) python3 dev/test/fuzz_json.py
	SECONDS=$(SECONDS) $(BUILD)/test_comm
