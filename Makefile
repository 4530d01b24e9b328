# The two commands are `make run` and `make test`; the rest are their parts.
CARGO ?= cargo
PYTHON ?= python3
VENV := tests/.venv
STAMP := $(VENV)/installed

.PHONY: help run build ort test test-rust test-clients bench bench-load lint models

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: build ## build in release, serve models/ and print a first request
	@scripts/run.sh target/release/tidegate models

build: ort ## the release binary
	$(CARGO) build --release --locked

ort: ## ONNX Runtime's shared library into .cache/ (nothing to do when it is there)
	@scripts/fetch-onnxruntime.sh

test: test-rust test-clients ## everything that tests need, then all tests

test-rust: ort ## unit, property and integration tests in Rust
	@scripts/install-test-packages.sh
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		echo '$(CARGO) nextest run --locked'; $(CARGO) nextest run --locked; \
	else \
		echo '$(CARGO) test --locked (cargo-nextest is not installed)'; $(CARGO) test --locked --lib --bins --tests; \
	fi
	$(CARGO) test --locked --doc
	$(CARGO) test --locked --quiet --bench request_path >/dev/null # each benchmark once
	$(CARGO) test --locked --manifest-path loadtest/Cargo.toml

test-clients: ort $(STAMP) ## real clients against the built binary
	@scripts/install-test-packages.sh
	$(CARGO) build --locked --bins --tests
	$(VENV)/bin/python -m pytest -q tests/clients

# Five environments: two clients want different versions of protobuf, schemathesis and the MLflow server have much of their own, and
# Evidently wants an older pandas.
$(STAMP): tests/requirements.txt tests/requirements-evidently.txt tests/requirements-kserve.txt tests/requirements-mlflow.txt tests/requirements-schemathesis.txt
	@echo 'installing the Python clients into $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements.txt
	@$(PYTHON) -m venv $(VENV)/kserve
	@$(VENV)/kserve/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements-kserve.txt
	@$(PYTHON) -m venv $(VENV)/schemathesis
	@$(VENV)/schemathesis/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements-schemathesis.txt
	@$(PYTHON) -m venv $(VENV)/mlflow
	@$(VENV)/mlflow/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements-mlflow.txt
	@$(PYTHON) -m venv $(VENV)/evidently
	@$(VENV)/evidently/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements-evidently.txt
	@touch $@

bench: ort ## what each step of a request costs (a release build and a few minutes)
	$(CARGO) bench --locked --bench request_path

lint: ## formatting, clippy with warnings as errors, licences and sources of dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) deny --locked check bans licenses sources
	$(CARGO) fmt --check --manifest-path loadtest/Cargo.toml
	$(CARGO) clippy --locked --all-targets --all-features --manifest-path loadtest/Cargo.toml -- -D warnings
	$(CARGO) deny --locked --manifest-path loadtest/Cargo.toml check bans licenses sources

models: ## train models/ again (needs the packages of models/requirements.txt)
	$(PYTHON) models/train.py

# `make bench-load ARGS='--connections 64 --rounds 3'`: more of loadtest's flags.
bench-load: build ## compare the gateway with bare echo servers, in turns
	$(CARGO) build --release --locked --manifest-path loadtest/Cargo.toml
	ORT_DYLIB_PATH=$(CURDIR)/.cache/onnxruntime/lib/libonnxruntime.so loadtest/target/release/loadtest compare \
		--gateway-binary target/release/tidegate --models loadtest/models $(ARGS)
