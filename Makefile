# `make help` lists the targets. The two that a newcomer needs: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# local: the cluster of hack/cluster, started when it is not running. existing: the current kubectl context, nothing started.
CLUSTER ?= local
# Where images are pulled from with CLUSTER=existing, for example 123456789012.dkr.ecr.us-west-2.amazonaws.com/finetune
IMAGE_PREFIX ?= localhost
NAMESPACE ?= finetune-system
RELEASE ?= finetune-operator
# Extra arguments for pytest, for example: make unit PYTEST_ARGS="-k packing -x"
PYTEST_ARGS ?=

export CLUSTER NAMESPACE

BIN := .venv/bin
PY := $(BIN)/python
CLUSTER_PY := python3 hack/cluster/cluster.py
CLUSTER_ENV := if [ "$(CLUSTER)" = local ]; then eval "$$($(CLUSTER_PY) env)"; fi
# Sets TRAINER_IMAGE and OPERATOR_IMAGE for the tests that start pods.
IMAGE_ENV = mkdir -p build; $(IMAGES) env > build/images.env; set -a; . build/images.env; set +a
IMAGES := $(PY) hack/images.py --cluster $(CLUSTER) --prefix $(IMAGE_PREFIX)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[36m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Everyday

.PHONY: setup
setup: ## Make .venv with pinned dependencies (nothing to do when it is current)
	@./hack/setup.sh

.PHONY: demo
demo: setup cluster-up images install ## Fine-tune a small model on a real cluster, from kubectl apply to its answers
	@$(CLUSTER_ENV); $(PY) hack/demo/demo.py --trainer-image "$$($(IMAGES) print trainer)" \
	  $(if $(filter existing,$(CLUSTER)),--existing-cluster,) $(DEMO_ARGS)

.PHONY: test
test: setup lint type unit chart cluster-up images install ## Everything: lint, types, unit, chart, contract and end-to-end tests
	@$(CLUSTER_ENV); $(IMAGE_ENV); \
	  $(PY) -m pytest tests/contract tests/e2e tests/rights $(PYTEST_ARGS)

.PHONY: unit
unit: setup ## Unit tests; no cluster, no root
	@$(PY) -m pytest tests/unit --ignore=tests/unit/chart $(PYTEST_ARGS)

##@ Checks

.PHONY: lint
lint: setup ## ruff (style and imports) and the import boundaries
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

.PHONY: type
type: setup ## mypy, strict
	@$(BIN)/mypy
	@cd hack/cluster && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --strict local_cluster cluster.py
	@$(BIN)/mypy --python-version 3.10 --package finetune_trainer

.PHONY: chart
chart: setup helm ## Chart tests on helm's own rendering
	@$(CLUSTER_ENV); $(PY) -m pytest tests/unit/chart $(PYTEST_ARGS)

.PHONY: contract
contract: setup cluster-up ## Contract tests on a real API server, controller-manager and scheduler
	@$(CLUSTER_ENV); $(PY) -m pytest tests/contract tests/rights $(PYTEST_ARGS)

.PHONY: e2e
e2e: setup cluster-up images install ## End-to-end tests: the installed chart, real images, faults injected
	@$(CLUSTER_ENV); $(IMAGE_ENV); \
	  $(PY) -m pytest tests/e2e tests/rights $(PYTEST_ARGS)

.PHONY: test-kueue
test-kueue: setup cluster-up images install ## Only the tests on the real Kueue: quotas, admission stage by stage, preemption
	@$(CLUSTER_ENV); $(IMAGE_ENV); $(PY) -m pytest tests/contract/test_kueue.py tests/e2e/test_kueue.py tests/rights $(PYTEST_ARGS)

.PHONY: test-neuron
test-neuron: setup cluster-up images install ## Only the rehearsal of Trainium: a whole job on a node with devices patched on, stand-ins for the vendor
	@$(CLUSTER_ENV); $(IMAGE_ENV); $(PY) -m pytest tests/e2e/test_neuron_rehearsal.py $(PYTEST_ARGS)

.PHONY: test-leadership
test-leadership: setup cluster-up ## Two replicas: the leader killed, stopped in order, frozen; seconds to the hand-over
	@$(CLUSTER_ENV); $(PY) -m pytest -s tests/contract/test_leadership.py $(PYTEST_ARGS)

.PHONY: golden
golden: setup helm ## Rewrite tests/golden; review the diff
	@$(CLUSTER_ENV); UPDATE_GOLDEN=1 $(PY) -m pytest -q tests/unit/finetune_operator tests/unit/finetune_client tests/unit/chart -k golden

.PHONY: generate
generate: setup ## Regenerate crds/, docs/api.md, spec_schema.json and the chart's copies
	@$(PY) -m finetune_operator.api.crd .
	@$(PY) hack/generate_chart.py

.PHONY: verify
verify: generate golden ## Regenerate everything and fail when that changes a tracked file
	@git diff --exit-code -- crds docs charts tests/golden trainer/src/finetune_trainer/spec_schema.json

.PHONY: requirements
requirements: setup ## Resolve requirements/*.in again (upgrades within the pins)
	@./hack/requirements.sh

.PHONY: bench-handoff
bench-handoff: setup ## From one stage's end to the next stage's pod, for a job that ran before (BENCH_ARGS: --namespace, --job)
	@$(CLUSTER_ENV); $(PY) bench/handoff.py $(BENCH_ARGS)

.PHONY: bench-operator
bench-operator: setup cluster-up ## 1,000 FineTuneJobs on fake nodes, against a bare client that creates the same Jobs (BENCH_ARGS)
	@if [ "$(CLUSTER)" = local ]; then $(CLUSTER_PY) kwok up --stages tests/fake_stages.yaml; fi
	@$(CLUSTER_ENV); kubectl apply --server-side --force-conflicts -f crds >/dev/null; \
	  kubectl wait --for=condition=Established -f crds --timeout=30s >/dev/null; \
	  $(PY) bench/operator/bench.py $(BENCH_ARGS)

.PHONY: bench-trainer
bench-trainer: setup ## The trainer against peft, TRL, cp and torch.save, by turns; ends in one JSON line (BENCH_ARGS: names)
	@./hack/setup_bench.sh
	@.venv-bench/bin/python bench/trainer $(BENCH_ARGS)

.PHONY: test-kills
test-kills: setup cluster-up ## Kill the operator before and after every API call of a whole job; minutes (KILLS_ARGS)
	@$(CLUSTER_ENV); $(PY) tests/kills/run_all.py $(KILLS_ARGS)

.PHONY: test-resume
test-resume: setup ## Kill a training at every step and moment of a checkpoint, 1 to 4 processes; minutes
	@$(PY) -m pytest tests/resume $(PYTEST_ARGS)

.PHONY: test-cuda
test-cuda: setup ## What must hold on a GPU as on a CPU: bf16, FSDP2, nf4, resume, memory; skipped where no GPU is
	@$(PY) -m pytest tests/cuda $(PYTEST_ARGS)

.PHONY: test-python310
test-python310: setup ## The trainer's unit tests on Python 3.10, as in the Neuron image; minutes (PYTHON310, PYTEST_ARGS)
	@./hack/setup_python310.sh
	@.venv-python310/bin/python -m pytest -p no:cacheprovider tests/unit/finetune_trainer $(PYTEST_ARGS)

.PHONY: test-neuron-vendor
test-neuron-vendor: setup ## Hold what we call of neuronx-distributed against a checkout: NXD=/path (v2.26.0), XLA=/path (v2.8.0)
	@NXD="$(NXD)" XLA="$(XLA)" $(PY) -m pytest -rA tests/vendor_source $(PYTEST_ARGS)

##@ Cluster

.PHONY: cluster-up
cluster-up: ## Build (once) and start a real single-node Kubernetes on this machine
	@if [ "$(CLUSTER)" = local ]; then $(CLUSTER_PY) up; else kubectl version >/dev/null \
	  || { echo "CLUSTER=existing: kubectl reaches no cluster; check KUBECONFIG and the current context" >&2; exit 1; }; fi

.PHONY: cluster-down
cluster-down: ## Stop it and remove every process, mount, bridge and firewall rule of it
	@$(CLUSTER_PY) down

.PHONY: cluster-status
cluster-status: ## Show what of it runs
	@$(CLUSTER_PY) status

.PHONY: kueue-up
kueue-up: cluster-up ## Build (once) and start Kueue 0.12.2 in it, with its webhooks
	@if [ "$(CLUSTER)" = local ]; then $(CLUSTER_PY) kueue up; else kubectl get crd workloads.kueue.x-k8s.io >/dev/null \
	  || { echo "CLUSTER=existing: this cluster has no Kueue; install it there first" >&2; exit 1; }; fi

.PHONY: kueue-down
kueue-down: ## Remove Kueue with its webhooks, kinds and all their objects
	@$(CLUSTER_PY) kueue down

.PHONY: helm
helm:
	@if [ "$(CLUSTER)" = local ]; then $(CLUSTER_PY) build; fi

.PHONY: images
images: setup ## Build the operator's and the trainer's image where they are missing; tags are digests of their inputs
	@$(IMAGES) build

.PHONY: images-neuron
images-neuron: setup ## Build the image for Trainium nodes over the vendor's base; CLUSTER=existing: print the commands
	@$(if $(filter existing,$(CLUSTER)),$(IMAGES) wheels neuron; )$(IMAGES) build neuron

.PHONY: install
install: images ## helm upgrade --install the operator with these images
	@$(CLUSTER_ENV); helm upgrade --install $(RELEASE) charts/finetune-operator --namespace $(NAMESPACE) --create-namespace \
	  $$($(IMAGES) helm-args) --take-ownership --wait --timeout 3m >/dev/null
	@echo "install: $(RELEASE) runs in namespace $(NAMESPACE)"

.PHONY: uninstall
uninstall: ## Remove the operator, its CRD and with it every FineTuneJob
	@$(CLUSTER_ENV); helm uninstall $(RELEASE) --namespace $(NAMESPACE) --wait --ignore-not-found; \
	  kubectl delete crd finetunejobs.finetune-operator.io --ignore-not-found

.PHONY: clean
clean: ## Remove build output and .venv of this checkout (caches outside the tree stay)
	@rm -rf build dist .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
