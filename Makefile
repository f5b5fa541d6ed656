# `make test` and `make demo` install what they need, once, into $WIT_CACHE (default ~/.cache/wit-plugins).
PYTHON ?= python3
WIT_CACHE ?= $(HOME)/.cache/wit-plugins
NOX_VERSION := 2026.10.20
NOX := $(WIT_CACHE)/nox-$(NOX_VERSION)/bin/nox
export WIT_CACHE

.PHONY: test demo lint docs

test: $(NOX)
	$(NOX)

demo: $(NOX)
	$(NOX) -s demo

lint: $(NOX)
	$(NOX) -s lint

docs: $(NOX)
	$(NOX) -s docs

$(NOX):
	$(PYTHON) -m venv $(WIT_CACHE)/nox-$(NOX_VERSION)
	$(WIT_CACHE)/nox-$(NOX_VERSION)/bin/pip install --quiet --disable-pip-version-check nox==$(NOX_VERSION)
