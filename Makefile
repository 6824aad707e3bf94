# `make serve` and `make test` set up what they need, each in an environment of its own, and again only when
# pyproject.toml or constraints.txt changed.
PYTHON ?= python3
ACCELERATOR ?= cpu
DATA_DIR ?=
SERVE := .venv/serve-$(ACCELERATOR)
DEV := .venv/dev
DATA := $(if $(DATA_DIR),--data-dir $(DATA_DIR))
# Models of one task trained alike, for `make train` and `make export`.
DATASET ?= sst2
TASK ?= sentiment
EXPORT_OPTIONS ?=
TRAIN_OPTIONS ?= --batch-size 64 --learning-rate 6e-4 --num-epochs 6 --mixed-precision bf16
# Options of `make bench` and `make loadtest`; `python -m loadtest.bench --help` and `python -m loadtest --help` list them.
BENCH_OPTIONS ?=
LOADTEST_OPTIONS ?=

.PHONY: help serve test test-deploy check format train export loadtest bench rules clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

serve: $(SERVE)/ready ## Set up and serve the bundles in models/ on http://127.0.0.1:8000 (ACCELERATOR=gpu for CUDA)
	exec $(SERVE)/bin/python -m service

test: $(DEV)/ready ## Set up and run every test but those that deploy
	$(DEV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-deploy: $(DEV)/ready ## Test the deployment, with the real Prometheus where it is installed
	$(DEV)/bin/python -m pytest -m "" tests/deploy

check: $(DEV)/ready ## Format, lint, types, import directions
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

format: $(DEV)/ready ## Format and mend what can be mended
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

train: $(DEV)/ready ## Train both models (DATASET=sst2, DATA_DIR=... for local files) into runs/
	for architecture in recurrent baseline; do \
		$(DEV)/bin/python -m training train --dataset $(DATASET) $(DATA) --architecture $$architecture \
			--output-dir runs/$(DATASET)-$$architecture $(TRAIN_OPTIONS) || exit; \
	done

export: $(DEV)/ready ## Export both runs into models/ (DATASET=sst2; TASK=sentiment begins the folders' names)
	for architecture in recurrent baseline; do \
		$(DEV)/bin/python -m model_export runs/$(DATASET)-$$architecture models/$(TASK)-$$architecture $(DATA) $(EXPORT_OPTIONS) || exit; \
	done

loadtest: $(DEV)/ready ## Compare recurrent and baseline under load (LOADTEST_OPTIONS=--quick: a look); writes docs/results/loadtest.*
	$(DEV)/bin/python -m loadtest $(LOADTEST_OPTIONS)

bench: $(DEV)/ready ## Measure the service against the raw runtime (BENCH_OPTIONS=--quick: a look); writes docs/results/bench.*
	$(DEV)/bin/python -m loadtest.bench $(BENCH_OPTIONS)

# One PrometheusRule for each rule file, whose text it holds as it is.
RULE_HEAD := ---\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: refrain-%s\nspec:\n
rules: ## Write Kubernetes' PrometheusRules from monitoring/prometheus/rules
	{ echo "# Written by \`make rules\` from monitoring/prometheus/rules: change those, and write this anew."; \
		for file in monitoring/prometheus/rules/*.yml; do \
			printf -- '$(RULE_HEAD)' "$$(basename $$file .yml)"; \
			sed 's/^./  &/' $$file; \
		done; } > k8s/components/monitoring/prometheusrules.yaml

clean: ## Remove the environments and caches
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

$(SERVE)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(SERVE)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(ACCELERATOR)]'
	touch $@

$(DEV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@
