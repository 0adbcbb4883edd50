# Makefile: builds what this machine can. `make help` says what it found.
#   CC, CFLAGS, NVCC can be set; SAN=1 builds with address and undefined-behaviour sanitizers.

CC ?= cc
SAN ?= 0
BUILD := build
ifeq ($(SAN),1)
BUILD := build/san
endif

# ---- what there is -----------------------------------------------------------------------------
try = $(shell printf '$(2)\n' | $(CC) $(1) -x c - -o /dev/null >/dev/null 2>&1 && echo yes)
HAS_OPENMP := $(call try,-fopenmp,int omp_get_max_threads(void); int main(void){return omp_get_max_threads() < 1;})
HAS_NATIVE := $(call try,-march=native,int main(void){return 0;})
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))

# No -ffast-math: it would defeat the checks for NaN. -fno-math-errno only lets sqrt be one instruction.
CFLAGS ?= -O3
CFLAGS_ALL := -std=gnu11 -Wall -Wextra -fno-math-errno $(CFLAGS)
CFLAGS_ALL += $(if $(HAS_NATIVE),-march=native) $(if $(HAS_OPENMP),-fopenmp,-Wno-unknown-pragmas)
ifeq ($(SAN),1)
CFLAGS_ALL += -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
endif
LDLIBS := -lm

HEADERS := $(wildcard fsa/*.h llmc/*.h dev/test/*.h) train_gpt_nsa.h
REFERENCE := $(BUILD)/config.o $(BUILD)/reference_f32.o $(BUILD)/reference_f64.o
CPU := $(if $(filter 1,$(SAN)),$(BUILD)/train_gpt_nsa_cpu,train_gpt_nsa_cpu)
MAKERS := $(BUILD)/recall $(BUILD)/text
TESTS := $(addprefix $(BUILD)/,test_reference test_golden test_model test_model_golden test_data test_run)

.PHONY: all train test bench cuda clean help data faults
all: $(CPU) $(MAKERS)

help:
	@echo "make train     build, make the recall data, train on it; ARGS='-flag value ...' adds flags"
	@echo "make test      build and run all tests; SAN=1: with address and undefined-behaviour sanitizers"
	@echo "make bench     time the kernels of this machine"
	@echo "make cuda      compile all CUDA code for all architectures (needs nvcc, no GPU)"
	@echo "make faults    plant faults in the reference, one at a time, and see a test fail for each"
	@echo "make clean     remove what was built; data and checkpoints stay"
	@echo "found: $(CC); OpenMP: $(or $(HAS_OPENMP),no); -march=native: $(or $(HAS_NATIVE),no); nvcc: $(or $(NVCC),no)"

# ---- the C programs ----------------------------------------------------------------------------
$(BUILD):
	@mkdir -p $@
$(BUILD)/config.o: fsa/config.c fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -c $< -o $@
$(BUILD)/reference_f32.o: fsa/reference.c fsa/reference.h fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -c $< -o $@
$(BUILD)/reference_f64.o: fsa/reference.c fsa/reference.h fsa/fsa.h | $(BUILD)
	$(CC) $(CFLAGS_ALL) -DFSA_REF_DOUBLE -c $< -o $@
$(CPU): train_gpt_nsa.c $(REFERENCE) $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(BUILD)/reference_f32.o $(LDLIBS) -o $@
$(BUILD)/recall $(BUILD)/text: $(BUILD)/%: data/%.c $(HEADERS) | $(BUILD)
	$(CC) $(CFLAGS_ALL) $< $(LDLIBS) -o $@
$(BUILD)/bench_reference: dev/bench_reference.c $(REFERENCE) $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(REFERENCE) $(LDLIBS) -o $@

# ---- train -------------------------------------------------------------------------------------
# The default task: recall of what was told up to 256 tokens ago. A second run goes on from the newest
# checkpoint; once all steps are done it says so and shows what was reached.
RECALL := -e recall -i 'data/recall/recall_train_*.bin' -j 'data/recall/recall_val_*.bin' -o log/recall -y 1 \
          -b 2 -x 1200 -l 2e-3 -u 150 -q 0 -beta2 0.98 -v 300 -m 0 -n 300 -s 600 -g 16 -prompt "Remember Mara : lamp . Remember Ruth : key . Recall Mara :"

data: $(MAKERS)
	@$(BUILD)/recall -o data/recall

train: $(CPU) data
	@./$(CPU) $(RECALL) $(ARGS)
	@echo
	@echo "Next:"
	@echo "  sample:             ./$(CPU) -e \$$(ls log/recall/ckpt_*.bin | tail -1) -sample 1 -temp 0 -g 24 -prompt 'Remember Mara : lamp . Remember Ruth : key . Recall Mara :'"
	@echo "  go on training:     make train ARGS='-x 1800'"
	@echo "  train on your text: $(BUILD)/text -o data/mytext -name mytext README.md fsa llmc && ./$(CPU) -e tiny -i 'data/mytext/mytext_train_*.bin' -j 'data/mytext/mytext_val_*.bin' -o log/mytext -y 1 -t 256 -x 100 -v 50 -s 100"

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

test: $(TESTS) $(CPU) $(MAKERS)
	@CPU=./$(CPU) BUILD=$(BUILD) bash dev/test/run.sh $(TESTS)

faults:
	@bash dev/test/faults.sh

bench: $(BUILD)/bench_reference
	@$(BUILD)/bench_reference

# ---- CUDA --------------------------------------------------------------------------------------
cuda:
	@echo "no CUDA code yet"

clean:
	rm -rf build train_gpt_nsa_cpu train_gpt_nsa test_gpt_nsa
