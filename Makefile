# make demo   the whole story on a tiny CLIP, from nothing
# make test   what CI runs
# make nightly  the tests that take minutes each
# make check  lint and types only
# make docs   docs/cli.md again, from --help, and the site in build/docs/site; warnings are errors

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# uv installs many times faster than pip; where it cannot reach the index that pip is set up for, pip does it.
INSTALL = { $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e $(1) || \
	$(BIN)/pip install -c constraints.txt -e $(1); } && touch $@

.PHONY: demo test nightly check docs constraints clean

demo: $(VENV)/installed
	$(BIN)/cbpt-runtime demo --force

test: check
	$(BIN)/pytest -m "not nightly"

nightly: $(VENV)/installed-test
	$(BIN)/pytest -m nightly

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-test
	$(BIN)/typer cbpt_runtime.cli.app utils docs --name cbpt-runtime --output docs/cli.md
	$(BIN)/python docs/build_site.py

constraints: $(VENV)/uv
	$(BIN)/uv pip compile --python-version 3.11 --extra batch --extra docs --extra heif --extra server --extra sign --extra test --extra writers --extra dev --no-annotate --no-header \
		--no-emit-index-url --upgrade --output-file constraints.txt pyproject.toml
	sed -i "s/^numpy==1.*/& ; python_version < '3.13'/" constraints.txt  # the server extra's limit, nobody else's

clean:
	rm -rf $(VENV) build dist demo-output

$(VENV)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	touch $@

# With the test server where it can be installed; the demo says so when it has to do without.
$(VENV)/installed: $(VENV)/uv pyproject.toml constraints.txt
	$(call INSTALL,'.[server]') || { echo "no Triton for this system: installing without" >&2; $(call INSTALL,.); }

$(VENV)/installed-test: $(VENV)/uv pyproject.toml constraints.txt
	$(call INSTALL,'.[batch$(comma)docs$(comma)heif$(comma)server$(comma)sign$(comma)test$(comma)writers]')
