# make demo    distil and train on the embedded digits, from nothing to a student's accuracy
# make test    all tests, with coverage
# make lint    ruff and mypy
# make test-oldest   the tests on the oldest supported versions (.ci/oldest-versions.txt)
# make gpu     what only a GPU can show: its tests, speed, and students of the paper's size; hours, and started again it
#              goes on. CIFAR10= and TINY= say where the images lie; gpu-tests, gpu-speed, gpu-cifar10, gpu-tiny and
#              gpu-ablations are its parts
# make clean   remove what builds, tools and the demo left; make distclean: the virtual environments too
# Every target makes the virtual environment it needs, and again when setup.cfg or pyproject.toml has changed.

PYTHON ?= python3
OLDEST_PYTHON ?= $(shell for python in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python3.10 $(PYTHON); do \
	"$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
WORKERS ?= 2

BIN := .venv/bin
DEMO := demo-output
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
COVERAGE := --cov --cov-report=term
# Two makes at once must not install into one environment; the second finds the work done.
LOCKED = $(if $(shell command -v flock),flock .venv.lock) $(MAKE) --no-print-directory --silent

.PHONY: demo test lint test-oldest gpu gpu-tests gpu-speed gpu-cifar10 gpu-tiny gpu-ablations clean distclean .venv .venv-oldest

demo: .venv
	@$(BIN)/python -m benchmarks.demo --out $(DEMO)

test: .venv
	@$(BIN)/python $(PYTEST) $(COVERAGE)

lint: .venv
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/mypy --no-error-summary

test-oldest: .venv-oldest
	@.venv-oldest/bin/python $(PYTEST)

gpu: gpu-tests gpu-speed gpu-cifar10 gpu-tiny gpu-ablations
# Also with -j: they share the GPU, and gpu-speed measures it.
.NOTPARALLEL: gpu

GPU := gpu-output
CIFAR10 ?= data/cifar10
TINY ?= data/tiny-imagenet
TEACHER := --epochs 8 --batch-size 512 --learning-rate 0.2 --bf16 --device cuda
STUDENTS := --preset full --seeds 0 1 2 --images random-real rded nrr+lr --processes 3 --device cuda

gpu-tests: .venv
	$(BIN)/python -m pytest -q -m gpu

gpu-speed: .venv
	$(BIN)/python -m benchmarks.builder_throughput --device cuda --compile bf16 --size 224 --batch-size 100 --iterations 50 --repeats 5 \
		--pairs 1000 --source-images 1000 --out benchmarks/results
	$(BIN)/python -m benchmarks.loader_wait --device cuda

gpu-cifar10: .venv
	for network in conv3 resnet18-small; do \
		$(BIN)/nrrdd teacher --dataset cifar10 --data-dir $(CIFAR10) --architecture $$network $(TEACHER) --out $(GPU)/cifar10-$$network.pt && \
		$(BIN)/python -m benchmarks.accuracy --dataset cifar10 --data-dir $(CIFAR10) --teacher-checkpoint $(GPU)/cifar10-$$network.pt \
			--student $$network $(STUDENTS) --ipc 10 50 1 --out $(GPU)/cifar10-$$network --name cifar10-$$network-gpu \
			--labels one-hot compact dbr dbr-priors dbr-further1 dbr-further3 fkd-top5 soft soft-t20 || exit; \
	done

gpu-tiny: .venv
	$(BIN)/nrrdd teacher --dataset tiny-imagenet --data-dir $(TINY) --architecture resnet18-small $(TEACHER) --out $(GPU)/tiny.pt
	for ipc in 10 50; do \
		$(BIN)/build-distilled --dataset tiny-imagenet --data-dir $(TINY) --ipc $$ipc --teacher-checkpoint $(GPU)/tiny.pt --device cuda --compile \
			--out $(GPU)/tiny-ipc$$ipc || exit; \
	done
	$(BIN)/python -m benchmarks.accuracy --dataset tiny-imagenet --data-dir $(TINY) --teacher-checkpoint $(GPU)/tiny.pt \
		--student resnet18-small $(STUDENTS) --compile --ipc 10 50 --out $(GPU)/tiny --name tiny-imagenet-gpu \
		--labels one-hot compact dbr dbr-priors99 dbr-further1-priors99 dbr-further3-priors99 fkd-top5 soft soft-t20

# The paper's ablations, on training images held out: its Tables 3 (networks), 5 to 9 (ε, r, the loss's weights, L_bn, confidence). Two of the networks
# shrink images of 32 px to one position, and need longer.
HELD_OUT := $(GPU)/cifar10-held-out
ABLATION = --dataset cifar10 --data-dir $(HELD_OUT) --seeds 0 1 2 --iterations 2000 --device cuda --compile --out $(GPU)/ablations
OF_RESNET = $(ABLATION) --teacher-checkpoint $(GPU)/held-out-resnet18-small.pt --student resnet18-small

gpu-ablations: .venv
	test -d $(HELD_OUT) || $(BIN)/python -m benchmarks.hold_out --data-dir $(CIFAR10) --out $(HELD_OUT)
	for network in resnet18-small conv3; do \
		$(BIN)/nrrdd teacher --dataset cifar10 --data-dir $(HELD_OUT) --architecture $$network $(TEACHER) --out $(GPU)/held-out-$$network.pt || exit; \
	done
	for network in mobilenet_v2 efficientnet_b0; do \
		$(BIN)/nrrdd teacher --dataset cifar10 --data-dir $(HELD_OUT) --architecture $$network $(subst --epochs 8,--epochs 30,$(TEACHER)) \
			--out $(GPU)/held-out-$$network.pt || exit; \
	done
	$(BIN)/python -m benchmarks.equations $(OF_RESNET) --labels dbr --choices epsilon radius alpha-bn confidence init mask --name ablations-dbr
	for images in rded nrr+lr; do \
		$(BIN)/python -m benchmarks.equations $(OF_RESNET) --labels soft-t20 --images $$images --choices confidence init --name ablations-$$images || exit; \
	done
	$(BIN)/python -m benchmarks.scale_factors $(OF_RESNET) --name ablations
	$(BIN)/python -m benchmarks.teachers $(ABLATION) --preset full --ipc 10 --images rded nrr+lr --labels one-hot dbr dbr-further3 soft-t20 --processes 3 \
		--teacher-checkpoint $(patsubst %,$(GPU)/held-out-%.pt,resnet18-small conv3 mobilenet_v2 efficientnet_b0) \
		--student resnet18-small conv3 mobilenet_v2 efficientnet_b0 --name ablations-networks

.venv:
	@$(LOCKED) .venv/.installed

.venv-oldest: .venv
	@$(LOCKED) .venv-oldest/.installed

# uv installs in seconds what pip's resolver may ponder for minutes.
.venv/.installed: setup.cfg pyproject.toml
	@echo "Installing into .venv; PyTorch is large, so this takes a minute or more"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[digits,test,lint]'
	@touch $@

.venv-oldest/.installed: setup.cfg pyproject.toml .ci/oldest-versions.txt
	@echo "Installing the oldest supported versions into .venv-oldest"
	@$(BIN)/uv venv --quiet --clear --python "$(OLDEST_PYTHON)" .venv-oldest
	@$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python -c .ci/oldest-versions.txt -e '.[digits,test]'
	@touch $@

clean:
	@rm -rf build dist *.egg-info $(DEMO) .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-oldest .venv.lock
