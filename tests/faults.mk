# The proof of docs/reliability.md. VENV, BIN and `develop` come from the Makefile that includes this.
FUZZ_SECONDS ?= 60
# Fewer merges, and every third call instead of every call, are part of `make test`.
SAFEPATCH_SOAK ?= 200
ENGINE_SOURCES = $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
ENGINE_FLAGS = -std=c++20 -O1 -ffp-contract=off -fno-omit-frame-pointer -Icsrc -Icsrc/include
# Python is not instrumented: the runtime is preloaded, and with it the library whose exceptions it watches.
runtime = $(shell $(CXX) -print-file-name=lib$(1).so):$(shell $(CXX) -print-file-name=libstdc++.so)

.PHONY: test-faults test-asan test-tsan fuzz fuzz-abi fuzz-fix fuzz-fix-file

test-faults: develop
	SAFEPATCH_LONG=1 SAFEPATCH_SOAK=$(SAFEPATCH_SOAK) $(BIN)/pytest -q -rs tests/faults

build/asan/lib/.built: $(wildcard csrc/*) $(wildcard safepatch_core/*.py safepatch_core/*/*.py) setup.py | develop
	SAFEPATCH_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1" \
		$(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	touch $@

# What measures memory is left out: the sanitizer's own is many times the engine's. So are loops that the compiler is to
# make vectors of, which it does not at -O1.
UNSANITIZED = not scratch_bounds and not loops_over_codes
test-asan: build/asan/lib/.built
	LD_PRELOAD=$(call runtime,asan) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=build/asan/lib \
	SAFEPATCH_SANITIZED=build/asan/lib SAFEPATCH_RANDOM_RECIPES=20 $(BIN)/pytest -q -p no:cacheprovider \
		tests/sanitize tests/test_cpu_engine.py tests/test_c_abi.py tests/test_merge_against_oracle.py \
		tests/test_checkpoint_headers.py tests/test_checkpoint_layout.py tests/fuzz -k "$(UNSANITIZED)"

build/tsan/lib/.built: $(wildcard csrc/*) $(wildcard safepatch_core/*.py safepatch_core/*/*.py) setup.py | develop
	SAFEPATCH_CXXFLAGS="-fsanitize=thread -fno-omit-frame-pointer -g1 -O1" \
		$(BIN)/python setup.py -q build --build-base build/tsan --build-lib build/tsan/lib
	touch $@

build/tsan/threads: tests/sanitize/threads.cpp $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CXX) $(ENGINE_FLAGS) -g1 -fsanitize=thread $< $(ENGINE_SOURCES) -o $@ -pthread

test-tsan: build/tsan/threads build/tsan/lib/.built
	TSAN_OPTIONS="halt_on_error=1" build/tsan/threads
	LD_PRELOAD=$(call runtime,tsan) TSAN_OPTIONS="halt_on_error=1" PYTHONPATH=build/tsan/lib SAFEPATCH_RANDOM_RECIPES=10 \
	$(BIN)/pytest -q -p no:cacheprovider tests/test_pipeline.py tests/test_cpu_engine.py \
		tests/test_merge_against_oracle.py -k "$(UNSANITIZED)"

# With clang's libFuzzer the C interface is fuzzed guided by coverage (scalar code); GCC's build replays what that found,
# and mutations of it, on all instruction sets.
build/fuzz-abi/guided: tests/fuzz/abi.cpp $(wildcard csrc/*)
	mkdir -p $(@D)
	clang++ $(ENGINE_FLAGS) -gline-tables-only -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< \
		$(ENGINE_SOURCES) -o $@ -pthread

build/fuzz-abi/replay: tests/fuzz/abi.cpp tests/fuzz/replay.cpp $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CXX) $(ENGINE_FLAGS) -g1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/fuzz/abi.cpp \
		tests/fuzz/replay.cpp $(ENGINE_SOURCES) -o $@ -pthread

fuzz-abi: build/fuzz-abi/replay
	mkdir -p build/fuzz/abi
	if command -v clang++ > /dev/null && $(MAKE) build/fuzz-abi/guided; then \
		ASAN_OPTIONS=detect_leaks=0 build/fuzz-abi/guided -max_total_time=$(FUZZ_SECONDS) -max_len=6000 -timeout=10 \
			-verbosity=0 -print_final_stats=1 build/fuzz/abi tests/corpus/abi; \
	else echo "skipped: coverage-guided fuzzing of the C interface needs clang and its libFuzzer"; fi
	ASAN_OPTIONS=detect_leaks=0:handle_abort=1 build/fuzz-abi/replay $(FUZZ_SECONDS) build/fuzz/abi tests/corpus/abi

build/fuzz-fix/replay: tests/fuzz/fix.cpp tests/fuzz/replay.cpp $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CXX) $(ENGINE_FLAGS) -g1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/fuzz/fix.cpp \
		tests/fuzz/replay.cpp $(ENGINE_SOURCES) -o $@ -pthread

fuzz-fix: build/fuzz-fix/replay
	ASAN_OPTIONS=detect_leaks=0:handle_abort=1 build/fuzz-fix/replay $(FUZZ_SECONDS) tests/corpus/fix tests/corpus/abi

build/fuzz-fix-file/replay: tests/fuzz/fix_file.cpp tests/fuzz/replay.cpp $(wildcard csrc/*)
	mkdir -p $(@D)
	$(CXX) $(ENGINE_FLAGS) -g1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/fuzz/fix_file.cpp \
		tests/fuzz/replay.cpp $(ENGINE_SOURCES) -o $@ -pthread

fuzz-fix-file: build/fuzz-fix-file/replay
	ASAN_OPTIONS=handle_abort=1 build/fuzz-fix-file/replay $(FUZZ_SECONDS) tests/corpus/fix_file

$(VENV)/.atheris: requirements/fuzz.txt | develop
	$(PIP) --no-deps --require-hashes -r $<
	touch $@

fuzz: fuzz-abi fuzz-fix fuzz-fix-file $(VENV)/.atheris
	for target in header index recipe adapter fix; do \
		$(BIN)/python tests/fuzz/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; \
	done
