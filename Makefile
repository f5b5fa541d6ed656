# `make test` and `make demo` install what they need, once, into $WIT_CACHE (default ~/.cache/wit-plugins).
PYTHON ?= python3
WIT_CACHE ?= $(HOME)/.cache/wit-plugins
NOX_VERSION := 2026.10.20
NOX := $(WIT_CACHE)/nox-$(NOX_VERSION)/bin/nox
export WIT_CACHE

.PHONY: test quick demo lint docs site real clean gpu wheels

test: $(NOX)
	$(NOX)

quick: $(NOX)
	$(NOX) -s quick

clean: $(NOX)
	$(NOX) -s clean

demo: $(NOX)
	$(NOX) -s demo

lint: $(NOX)
	$(NOX) -s lint

docs: $(NOX)
	$(NOX) -s docs

site: $(NOX)
	$(NOX) -s site

real: $(NOX)
	$(NOX) -s real

# Arguments: make gpu GPU_ARGS=--quick. Where no index can be reached: WIT_OFFLINE=1, with WIT_WHEELS=folder to install
# from (`WIT_WHEELS=folder make wheels` fills it elsewhere), or without, to use what $(PYTHON) has.
ifeq ($(WIT_OFFLINE)$(WIT_WHEELS),1)
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)
else
gpu: $(NOX)
	$(NOX) -s gpu -- $(GPU_ARGS)
endif

wheels: $(NOX)
	$(NOX) -s wheels

$(NOX): export PIP_NO_INDEX := $(if $(WIT_OFFLINE),1,)
$(NOX): export PIP_FIND_LINKS := $(if $(WIT_OFFLINE),$(WIT_WHEELS),$(PIP_FIND_LINKS))
$(NOX):
	$(PYTHON) -m venv $(WIT_CACHE)/nox-$(NOX_VERSION)
	$(WIT_CACHE)/nox-$(NOX_VERSION)/bin/pip install --quiet --disable-pip-version-check nox==$(NOX_VERSION)
