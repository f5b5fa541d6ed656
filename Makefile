# `make test` and `make demo` install what they need, once, into $WIT_CACHE (default ~/.cache/wit-plugins).
PYTHON ?= python3
WIT_CACHE ?= $(HOME)/.cache/wit-plugins
NOX_VERSION := 2026.10.20
NOX := $(WIT_CACHE)/nox-$(NOX_VERSION)/bin/nox
export WIT_CACHE

.PHONY: test quick demo lint docs clean

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

$(NOX):
	$(PYTHON) -m venv $(WIT_CACHE)/nox-$(NOX_VERSION)
	$(WIT_CACHE)/nox-$(NOX_VERSION)/bin/pip install --quiet --disable-pip-version-check nox==$(NOX_VERSION)
