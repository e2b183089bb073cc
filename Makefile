# A menu: each entry is one line over a script or a preset. PRESET=host|host-asan|cuda|release|bundle, CONFIG=run file,
# RANKS=of `make plan`.
PRESET ?= host
CONFIG ?= configs/run/tiny.yaml
RANKS ?= 4
SOURCES = $(shell git ls-files --cached --others --exclude-standard '*.cc' '*.h' '*.cu' '*.cuh')

.PHONY: help configure build test test-mpi test-gpu bundle format format-check tidy bench plan ci clean
help:          ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
configure:     ## cmake --preset $(PRESET)
	@bash launch/setup.sh && cmake --preset $(PRESET)
build:         ## build $(PRESET)
	@bash launch/build.sh $(PRESET)
test:          ## build, then all tests but slow ones
	@bash launch/test.sh --preset $(PRESET)
test-mpi:      ## tests on several MPI ranks
	@bash launch/test.sh --preset $(PRESET) --label mpi
test-gpu:      ## tests that need a GPU (preset cuda)
	@bash launch/test.sh --preset cuda --label gpu
bundle:        ## dist/baleen: binary and GPU tests for machines without a compiler
	@bash launch/bundle.sh
format:        ## clang-format every source in place
	@clang-format -i $(SOURCES)
format-check:  ## say what clang-format would change
	@clang-format --dry-run --Werror $(SOURCES)
tidy:          ## clang-tidy over the sources of $(PRESET)
	@bash launch/build.sh $(PRESET) && run-clang-tidy -quiet -p build/$(PRESET) '/(kernels|configs|checkpoints|data|parallel|trainer)/.*\.cc$$'
bench:         ## check and time the CUDA kernels (needs a GPU and nvcc)
	@bash kernels/bench/run_kernel_benches.sh
plan:          ## parse CONFIG, check its files, print what each stage would do; trains nothing
	@bash launch/build.sh $(PRESET) baleen && bash launch/mpirun.sh -np $(RANKS) build/$(PRESET)/trainer/baleen train $(CONFIG) --dry-run
ci:            ## everything a change must pass
	@bash .ci/run
clean:         ## remove build/
	@rm -rf build
