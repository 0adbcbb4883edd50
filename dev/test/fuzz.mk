# fuzz.mk: feeds mutated files, random flags and kills to the trainers and the data programs. The Makefile includes it
# after CPU and MAKERS. `make fuzz` runs each program for 5 seconds, `make fuzz SECONDS=600` for ten minutes; with
# SAN=1 they are built with the sanitizers. COUNT=20000 sets a least number of files, flags or kills.
SECONDS ?= 5
$(BUILD)/fuzz_files: dev/test/fuzz_files.c $(BUILD)/config.o $(BUILD)/comm.o $(HEADERS)
	$(CC) $(CFLAGS_ALL) $< $(BUILD)/config.o $(BUILD)/comm.o $(LDLIBS) -o $@

.PHONY: fuzz
fuzz: $(BUILD)/fuzz_files $(CPU) $(MAKERS)
	SECONDS=$(SECONDS) $(BUILD)/fuzz_files
	SECONDS=$(SECONDS) python3 dev/test/fuzz_flags.py ./$(CPU) $(BUILD)/recall
	SECONDS=$(SECONDS) python3 dev/test/fuzz_kills.py ./$(CPU) $(BUILD)/recall
	SECONDS=$(SECONDS) python3 dev/test/fuzz_json.py
