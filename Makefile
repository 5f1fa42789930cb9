# `make` with no target lists what there is. Nothing here needs arguments; those shown have defaults.

.SHELLFLAGS := -euo pipefail -c
SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

HOSTS ?= 2
CLIENTS ?= 1
HOST ?= h1
CMD ?= podman ps --all
RUNS ?= 10
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

.PHONY: demo
demo: prepare ## watch a container move while a client talks to it (root)
	cargo bench --bench demo

.PHONY: bench
bench: prepare ## the client's longest gap and the total time, beside Podman and shell by hand (RUNS=10)
	LIVEMIG_BENCH_RUNS=$(RUNS) cargo bench --bench downtime

.PHONY: lint
lint: ## formatting, clippy, documentation: no warnings
	cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
	cargo fmt --check
	rustfmt --edition 2024 --check tests/lab/workload.rs
	bash -n $(LAB)
	cargo clippy --all-targets -- $(DENY)
	cargo clippy --no-default-features -- $(DENY)
	RUSTDOCFLAGS="$(DENY)" cargo doc --no-deps --document-private-items
