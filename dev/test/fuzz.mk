# fuzz.mk: programs that feed mutated files and random flags to the trainers and the data programs. The Makefile
# includes it. `make fuzz SECONDS=600` runs each for ten minutes; SAN=1 with the sanitizers.
SECONDS ?= 5
$(BUILD)/fuzz_files: dev/test/fuzz_files.c $(BUILD)/config.o $(BUILD)/comm.o $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(BUILD)/comm.o $(LDLIBS) -o $@

.PHONY: fuzz
fuzz: $(BUILD)/fuzz_files $(CPU) $(MAKERS)
	SECONDS=$(SECONDS) $(BUILD)/fuzz_files
	SECONDS=$(SECONDS) python3 dev/test/fuzz_flags.py ./$(CPU) $(BUILD)/recall
	SECONDS=$(SECONDS) python3 dev/test/fuzz_json.py
