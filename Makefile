# `make` with no target lists what there is. Nothing here needs arguments; those shown have defaults.

.SHELLFLAGS := -euo pipefail -c
SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

HOSTS ?= 2
CLIENTS ?= 1
HOST ?= h1
CMD ?= podman ps --all
RUNS ?= 15
SECONDS ?= 60
LAB := tests/lab/lab

# Warnings are errors here and in CI, not while one works.
DENY := -D warnings

.PHONY: help
help: ## this list
	@echo "targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: lab-up
lab-up: ## start Podman hosts in namespaces (HOSTS=2 CLIENTS=1), for work by hand
	$(LAB) up $(HOSTS) $(CLIENTS)
	@$(LAB) ls

.PHONY: lab-exec
lab-exec: ## run a command on one of them (HOST=h1 CMD='podman ps')
	@$(LAB) exec $(HOST) sh -c '$(subst ','\'',$(CMD))'

.PHONY: lab-down
lab-down: ## take them down, leaving nothing behind
	$(LAB) down

.PHONY: prepare
prepare: ## install what tests need, build and cache the hosts' file system and images
	$(LAB) prepare

# nextest runs each test in a process of its own and no more than two labs at once
# (.config/nextest.toml). Without it, one test at a time does the same, slower.
.PHONY: test
test: prepare ## all tests (root: hosts are made of namespaces)
	cargo build --all-targets
	if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --lib --bins --tests --no-fail-fast; \
	else \
		echo "cargo-nextest is not installed: one test at a time"; \
		cargo test --lib --bins --tests --no-fail-fast -- --test-threads=1; \
	fi
	cargo test --doc

# With the command as it is in debug builds: those can be stopped at a chosen moment.
.PHONY: test-faults
test-faults: prepare ## every fault at every moment of a migration (LIVEMIG_FAULTS=freeze/agent-killed,...)
	cargo test --test faults -- --run

# 40 take some eight minutes; RUNS=200, forty.
.PHONY: test-soak
test-soak: prepare ## a container moves to and fro under load, with faults drawn by lot (RUNS=40)
	LIVEMIG_SOAK_RUNS=$(if $(filter command,$(firstword $(origin RUNS))),$(RUNS),40) \
		cargo test --test faults -- --soak

# The readers of bytes from outside (src/fuzzing). `make test` gives each some thousand inputs; this looks
# for those that lead where none has led before.
TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

.PHONY: fuzz
fuzz: ## look for input that a reader does not survive (SECONDS=60 for each, TARGETS='files vetted')
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	command -v c++ >/dev/null || { apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends g++; }
	fuzz/run $(SECONDS) $(TARGETS)

.PHONY: fuzz-corpus
fuzz-corpus: ## write the inputs to begin with anew, after a format has changed
	cargo test --lib fuzzing::tests::writes_the_corpus -- --ignored

.PHONY: demo
demo: prepare ## watch a container move while a client talks to it (root)
	cargo bench --bench demo

# Optimised, since what they run is emulated. VM_PROFILE=dev takes what `make test` has built.
VM_PROFILE ?= bench

.PHONY: prepare-vm
prepare-vm: prepare ## build and cache what test-vm and demo-vm need besides
	tests/vm/vm prepare

.PHONY: test-vm
test-vm: prepare-vm ## migrations between two emulated machines: kernel WireGuard, nftables' queue, soft-dirty (root)
	LIVEMIG_VM_PARTS=migrations cargo bench --profile $(VM_PROFILE) --bench vm -- test
	@# Only debug builds can be stopped at a chosen moment.
	LIVEMIG_VM_PARTS=clocks,power cargo bench --profile dev --bench vm -- test

.PHONY: demo-vm
demo-vm: prepare-vm ## one of them, step by step (root)
	cargo bench --profile $(VM_PROFILE) --bench vm -- demo

# Optimised, each prints its table and writes target/bench/NAME.json. Some 80 minutes in all, of which
# the first takes more than half (LIVEMIG_BENCH_SHARE=30 for a quick look at it, see benches/downtime); for
# figures that mean something, on a machine that does nothing else. All are run, also when one of them
# falls short of what is asked of it, which the exit status then says.
BENCHES := downtime growth stream udp iperf flows

.PHONY: bench
bench: prepare ## all benches below, one after the other (RUNS=15, of the first)
	failed=; for bench in $(BENCHES); do \
		printf '\n== %s\n' $$bench; \
		$(MAKE) bench-$$bench || failed="$$failed $$bench"; \
	done; \
	if [[ -n $$failed ]]; then echo "fell short:$$failed"; exit 1; fi

.PHONY: bench-downtime
bench-downtime: prepare ## gap, total time, bytes and memory by engine and size, beside the floor
	LIVEMIG_BENCH_RUNS=$(RUNS) cargo bench --bench downtime

# Storage in memory has to hold what Podman makes of the largest containers.
.PHONY: bench-growth
bench-growth: prepare ## gap and total time against the container's memory, 64 MiB to 4 GiB: table and SVG
	LIVEMIG_LAB_STORAGE_SIZE=$${LIVEMIG_LAB_STORAGE_SIZE:-8g} cargo bench --bench growth

.PHONY: bench-stream
bench-stream: prepare ## what one connection between two agents carries, and a container's memory on it
	cargo bench --bench stream

.PHONY: bench-udp
bench-udp: prepare ## numbered datagrams at four rates, one way and as echo, with and without a migration
	cargo bench --bench udp

.PHONY: bench-iperf
bench-iperf: prepare ## iperf3 in a container that moves twice: by second, as JSON and SVG
	cargo bench --bench iperf

.PHONY: bench-flows
bench-flows: prepare ## what 100, 1,000 and 10,000 connections of a container cost
	cargo bench --bench flows

# Installing cargo-deny takes some two minutes on two processors, once.
ADVISORIES := https://github.com/RustSec/advisory-db

.PHONY: deny
deny: ## what the dependencies may be: licences, sources, bans, known faults (deny.toml)
	cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny check licenses sources bans
	@if GIT_TERMINAL_PROMPT=0 timeout 60 git ls-remote $(ADVISORIES) HEAD >/dev/null 2>&1; then \
		cargo deny check advisories; \
	else \
		echo 'NOT CHECKED: known faults of the dependencies. Their list is a git repository that cannot be'; \
		echo '  reached from here: $(ADVISORIES)'; \
	fi

.PHONY: lint
lint: deny ## formatting, clippy, documentation, dependencies: no warnings
	cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
	cargo fmt --check
	rustfmt --edition 2024 --check tests/lab/workload.rs
	bash -n $(LAB)
	bash -n tests/vm/vm
	bash -n fuzz/run
	rustfmt --edition 2024 --check fuzz/fuzz_targets/*.rs
	cargo clippy --all-targets -- $(DENY)
	cargo clippy --no-default-features -- $(DENY)
	RUSTDOCFLAGS="$(DENY)" cargo doc --no-deps --document-private-items
